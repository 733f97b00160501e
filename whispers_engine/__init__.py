"""whispers-engine: committees of soft-prompt experts over one frozen language model."""

from .engine import Engine
from .errors import WhispersError
from .experts import Committee, Expert
from .request import Answer, Done, ExpertAnswer, Failed, Finished, Request, Routed, Scored, ScoreResult, Standing, Token
from .sampling import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Committee",
    "Done",
    "Engine",
    "Expert",
    "ExpertAnswer",
    "Failed",
    "Finished",
    "Request",
    "Routed",
    "SamplingParams",
    "ScoreResult",
    "Scored",
    "Standing",
    "Token",
    "WhispersError",
]
