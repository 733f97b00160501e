"""Training of soft prompts: all experts of a file at once, over contexts that are computed once (see docs/training.md)."""

from .base import Base
from .phase import Progress
from .settings import Settings
from .trainer import Trained, train

__all__ = ["Base", "Progress", "Settings", "Trained", "train"]
