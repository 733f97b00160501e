"""What a training run is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import WhispersError
from ..experts import KINDS, PLACEMENTS

DECAYS = ("linear", "cosine", "none")
INITS = ("text", "vocab")
VIRTUAL_TOKENS = 16


@dataclass(frozen=True)
class Settings:
    """A run's settings.

    Attributes:
        placement, kind: as `Expert`'s.
        virtual_tokens: m; None: as the experts have them that `init` names, else 16.
        init: "text" (a sentence that names the culture), "vocab" (random tokens' embeddings), or the folder of an expert or a committee.
        experts: which cultures, by name or by their expert's; None: all of the file.
        steps: of every expert; 0: the shared soft prompt is all that is trained, and becomes the only expert.
        shared_steps: before those, of one soft prompt trained on all cultures, from which every expert then starts; 0: none.
        batch: examples an expert and step.
        rate: the largest learning rate, above 0.
        warmup: the share of the steps in which the rate rises.
        decay: how it falls to zero after that: "linear", "cosine", or "none".
        clip: the largest norm of an expert's gradient, above 0; None: any.
        weight_decay: decoupled, as AdamW's.
        dev_share: the share of the questions that is held out to stop by.
        evaluate_every: steps between looks at what is held out; None: a tenth of the steps.
        patience: looks in a row that were clearly worse (see `Watch`) after which an expert stops; None: none stops.
        orders: in how many orders listed options are asked; 1: as the record lists them.
        seed: of the examples' order, of option orders and of "vocab".
        checkpoint_seconds: how often, at most, a checkpoint is written.
        context_memory: bytes for contexts' keys and values before they go to a file; None: chosen for the device.
        rows_at_once: rows that are computed together; None: chosen for the device.
        licence: of the data; goes into every expert's record.
    """

    placement: str = "suffix"
    kind: str = "embeddings"
    virtual_tokens: int | None = None
    init: str | Path = "text"
    experts: tuple[str, ...] | None = None
    steps: int = 200
    shared_steps: int = 0
    batch: int = 8
    rate: float = 0.01
    warmup: float = 0.05
    decay: str = "linear"
    clip: float | None = 1.0
    weight_decay: float = 0.0
    dev_share: float = 0.1
    evaluate_every: int | None = None
    patience: int | None = 4
    orders: int = 1
    seed: int = 0
    checkpoint_seconds: float = 30.0
    context_memory: int | None = None
    rows_at_once: int | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        for name, value, accepted in (("kind", self.kind, KINDS), ("decay", self.decay, DECAYS)):
            if value not in accepted:
                raise WhispersError(f"{name}: {value!r}; accepted: {', '.join(accepted)}")
        placements = PLACEMENTS if self.kind == "embeddings" else ("prefix", "detached")
        if self.placement not in placements:
            raise WhispersError(
                f"placement {self.placement!r} of kind {self.kind!r}; accepted: {', '.join(placements)}"
            )
        for name, number, least in (
            ("virtual_tokens", self.virtual_tokens, 1),
            ("steps", self.steps, 0 if self.shared_steps else 1),
            ("shared_steps", self.shared_steps, 0),
            ("batch", self.batch, 1),
            ("evaluate_every", self.evaluate_every, 1),
            ("patience", self.patience, 1),
            ("orders", self.orders, 1),
            ("seed", self.seed, 0),
            ("context_memory", self.context_memory, 0),
            ("rows_at_once", self.rows_at_once, 1),
        ):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
                raise WhispersError(f"{name}: {number!r}; accepted: an integer, at least {least}")
        for name, real, low, high in (
            ("warmup", self.warmup, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, math.inf),
            ("dev_share", self.dev_share, 0.0, 1.0),
            ("checkpoint_seconds", self.checkpoint_seconds, 0.0, math.inf),
        ):
            if real is not None and not (isinstance(real, int | float) and low <= real <= high and real != math.inf):
                raise WhispersError(f"{name}: {real!r}; accepted: a number from {low:g} to {high:g}")
        # With a rate of 0, or of a gradient cut to nothing, nothing is learned.
        for name, size, others in (("rate", self.rate, ""), ("clip", self.clip, ", or None")):
            if size is not None and not (isinstance(size, int | float) and 0 < size < math.inf):
                raise WhispersError(f"{name}: {size!r}; accepted: a number above 0{others}")
