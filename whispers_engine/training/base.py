"""The frozen base as training sees it: plain tensors, what turns text into ids, and a name for both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from whispers_kernels.ops import check_impl

from .. import auto
from .. import engine as engines
from ..chat import ChatEncoder, load_tokenizer
from ..config import DTYPES, ModelConfig
from ..errors import WhispersError
from ..model import Model
from ..weights import Checkpoint, Weights, load_weights

if TYPE_CHECKING:
    from ..engine import Engine

_TRAINED_IN = ("float32", "bfloat16")  # float16 would need a scaled loss


@dataclass(frozen=True)
class Base:
    """A frozen base model.

    Attributes:
        name: as a committee names it.
        model: the engine's decoder over the same weights, for contexts. On a CPU its kernels hold a packed copy.
        inverse: rotary angle per position, float32 `[head_dim / 2]`, on the device.
    """

    name: str
    fingerprint: str
    config: ModelConfig
    weights: Weights
    chat: ChatEncoder
    model: Model
    inverse: Tensor

    @property
    def device(self) -> torch.device:
        return self.weights.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embeddings.dtype

    @classmethod
    def load(cls, model: str | Path, device: str = "auto", dtype: str = "auto") -> Base:
        """Reads a base as `Engine` does: a local folder, a hub id, or a built-in name.

        Args:
            dtype: "auto" (bfloat16 where the device multiplies it, else float32), "float32" or "bfloat16".

        Raises:
            WhispersError: as `Engine`, or a dtype that is not trained in.
        """
        if dtype not in ("auto", *_TRAINED_IN):
            raise WhispersError(f"dtype: {dtype!r}; accepted to train in: auto, {', '.join(_TRAINED_IN)}")
        where = engines.device_of(device)
        folder = engines.base_folder(model)
        config = ModelConfig.load(folder)
        checkpoint = Checkpoint(folder)
        name = str(Path(model).resolve() if Path(model).is_dir() else model)
        chat = ChatEncoder(load_tokenizer(folder), config.vocab_size)
        chosen = DTYPES[dtype] if dtype != "auto" else _auto_dtype(where, DTYPES[config.dtype])
        weights = load_weights(checkpoint, config, chosen, where)
        return cls._of(name, checkpoint, config, chat, weights, Model(config, weights))

    @classmethod
    def of(cls, engine: Engine) -> Base:
        """The base of an engine, in its dtype. Where kernels keep packed weights only, they are read once more from its folder.

        Raises:
            WhispersError: an engine in float16.
        """
        if engine.model.dtype not in (DTYPES[name] for name in _TRAINED_IN):
            raise WhispersError(f"dtype: the engine's is {engine.model.dtype}; accepted to train in: {_TRAINED_IN}")
        config = engine.model.config
        checkpoint = Checkpoint(engines.base_folder(engine.model_name))
        weights = load_weights(checkpoint, config, engine.model.dtype, engine.model.device)
        return cls._of(engine.model_name, checkpoint, config, engine.chat, weights, engine.model)

    @classmethod
    def _of(
        cls,
        name: str,
        checkpoint: Checkpoint,
        config: ModelConfig,
        chat: ChatEncoder,
        weights: Weights,
        model: Model,
    ) -> Base:
        inverse = config.inverse_frequencies().to(weights.embeddings.device)
        return cls(name, checkpoint.fingerprint(config), config, weights, chat, model, inverse)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position's rotary angles, float32 `[R, D/2]`; positions may be negative."""
        angle = positions.float()[:, None] * self.inverse
        return angle.cos(), angle.sin()


def _auto_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    if device.type != "cpu":
        return torch.float32 if stored == torch.float32 else torch.bfloat16
    return auto.auto_dtype(device, check_impl("auto", device), stored)
