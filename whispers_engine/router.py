"""Routers: which experts a question concerns, with which weights, and whether culture is at stake in it at all.

A router reads the hidden states of the user's own words at one layer of the base, which the context's own pass computes anyway. The token
kind scores every token and adds up what they say; the other two score the mean of the hidden states. What they share is here once.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import WhispersError
from .files import new_file, system_errors
from .reading import MeanReader, Reader, TokenReader

if TYPE_CHECKING:
    from .experts import Expert

FILE = "router.safetensors"
VERSION = 1
QUERY_SHARE = 0.6  # of the query's feature where there is a profile's too (the paper's weights)
_META = "whispers-router"


def profile_text(profile: Mapping[str, str]) -> str:
    """A profile as the router's base reads it. Raises WhispersError for anything but names and texts."""
    if not isinstance(profile, Mapping) or not all(
        isinstance(part, str) and part.strip() for pair in profile.items() for part in pair
    ):
        raise WhispersError(
            f"profile: {profile!r}; accepted: a mapping from names to texts, such as {{'country': 'Japan'}}"
        )
    return ", ".join(f"{key.strip()}: {value.strip()}" for key, value in profile.items())


@dataclass(frozen=True, eq=False)
class Router(ABC):
    """What all kinds of router share.

    Args:
        experts: name and content hash of every expert it knows. An expert whose soft prompt has changed is not the one it knows.
        layer: which of the base's hidden states it reads, 0 to the number of layers.
        temperature: of the softmax over experts; above 0.
        confidence: where the likeliest expert's probability among all it may choose stays below this, the chosen ones get equal weights.
        gate: float32 `[hidden + 1]`, weights and bias; positive: culture is at stake. None: it always is.
        learned: float32, what the rule goes by.
    """

    experts: tuple[tuple[str, str], ...]
    layer: int
    temperature: float
    confidence: float
    gate: Tensor | None
    learned: Tensor

    kind: ClassVar[str]

    @property
    @abstractmethod
    def hidden(self) -> int:
        """The width of the hidden states that it reads."""

    @property
    @abstractmethod
    def reader(self) -> Reader:
        """What it reads of a context; `query` and `profile` below are this reader's features."""

    @abstractmethod
    def stake(self, query: Tensor) -> float:
        """How surely a query with this feature concerns culture: the log of the odds; above 0: it does."""

    @abstractmethod
    def scores(self, query: Tensor, profile: Tensor | None) -> Tensor:
        """One score an expert, float `[experts]`; larger is nearer."""

    @abstractmethod
    def shapes(self) -> dict[str, list[int]]:
        """Of all its tensors."""

    def knows(self, expert: Expert) -> bool:
        return (expert.name, expert.content_hash) in self.experts

    def at_stake(self, query: Tensor) -> bool:
        """Whether a query with this feature concerns culture at all."""
        return self.gate is None or self.stake(query) > 0

    def route(self, query: Tensor, profile: Tensor | None, names: Sequence[str], top_k: int) -> list[tuple[str, float]]:
        """Chooses among `names`, all of them known; returns names with weights that sum to one, heaviest first.

        Args:
            query: float32, the context's feature.
            profile: float32, the profile's feature, or None.
            top_k: how many are chosen at most.
        """
        index = {name: at for at, (name, _) in enumerate(self.experts)}
        scores = self.scores(query, profile)[[index[name] for name in names]].double() / self.temperature
        best, order = scores.sort(descending=True, stable=True)
        sure = float(scores.softmax(0).max()) >= self.confidence
        chosen = best[:top_k].softmax(0) if sure else torch.full_like(best[:top_k], 1 / len(best[:top_k]))
        return [(names[at], weight) for at, weight in zip(order.tolist(), chosen.tolist(), strict=False)]

    @cached_property
    def content_hash(self) -> str:
        """Names the function: of the kind, the settings and the values."""
        tensors, text = self._parts()
        values = [(name, list(value.shape), value.numpy().tobytes().hex()) for name, value in sorted(tensors.items())]
        return hashlib.sha256(json.dumps([text, values]).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes `router.safetensors` into a committee's folder, whole or not at all."""
        tensors, text = self._parts()
        with new_file(Path(folder) / FILE) as path, system_errors(path):
            save_file(tensors, path, metadata={_META: text})
            path.chmod(0o644)  # temporary files are private; results are not

    def _parts(self) -> tuple[dict[str, Tensor], str]:
        """Its tensors, and everything else as JSON."""
        tensors = {name: value.contiguous() for name, value in self._fields().items() if isinstance(value, Tensor)}
        meta = {name: value for name, value in self._fields().items() if not isinstance(value, Tensor | None)}
        return tensors, json.dumps({"kind": self.kind, "version": VERSION, **meta})

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class TokenRouter(Router):
    """Every token says something of every expert, linearly; an expert's score is the log of the sum of what they say, exponentiated. So one
    place's name counts in full in a text of any length, wherever it stands. Likewise the gate, of the mean of its exponentials: a long text
    is not at stake for its length alone.

    Args:
        learned: the experts' weights, `[experts, hidden + 1]`, the bias last.
        gate_scale, gate_shift: the gate's log of the odds is `gate_scale * (its score + gate_shift)`, calibrated on what it was not
            trained with.
        floor: how far above the median of all a score must lie to say anything; what lies lower counts as that high, so that a question
            that names nobody leaves all alike, however steep the temperature. None: no floor.
    """

    gate_scale: float = 1.0
    gate_shift: float = 0.0
    floor: float | None = None

    kind = "token"

    @property
    def hidden(self) -> int:
        return self.learned.shape[1] - 1

    @cached_property
    def reader(self) -> Reader:
        parts = [self.learned] if self.gate is None else [self.learned, self.gate[None]]
        return TokenReader(self.layer, torch.cat(parts))

    def stake(self, query: Tensor) -> float:
        return self.gate_scale * (float(query[-2] - query[-1]) + self.gate_shift)

    def scores(self, query: Tensor, profile: Tensor | None) -> Tensor:
        scores = query[: len(self.experts)].double()
        if profile is not None:
            hint = profile[: len(self.experts)].double()
            scores = torch.logaddexp(scores + math.log(QUERY_SHARE), hint + math.log(1 - QUERY_SHARE))
        return scores if self.floor is None else floored(scores, self.floor, self.temperature)

    def shapes(self) -> dict[str, list[int]]:
        return {"learned": [len(self.experts), self.hidden + 1], "gate": [self.hidden + 1]}


def floored(scores: Tensor, floor: float, temperature: float) -> Tensor:
    """Scores `[..., experts]` above their median, and softly at least `floor`, so that probabilities become
    `exp(score / temperature) + exp(floor / temperature)` over the sum of all."""
    above = (scores - scores.median(-1, keepdim=True).values) / temperature
    return temperature * torch.logaddexp(above, torch.full_like(above, floor / temperature))


@dataclass(frozen=True, eq=False)
class MeanRouter(Router):
    """Of those that score the mean hidden state, standardised.

    Args:
        mean, std: float32 `[hidden]`, the statistics that a query's feature is standardised with.
        profile_mean, profile_std: likewise, a profile's: short lines of keys and values lie elsewhere than questions.
        gate: on the standardised query.
    """

    mean: Tensor
    std: Tensor
    profile_mean: Tensor
    profile_std: Tensor

    @staticmethod
    @abstractmethod
    def rule(feature: Tensor, learned: Tensor) -> Tensor:
        """Of standardised features `[..., hidden]`: one score an expert, `[..., experts]`; larger is nearer."""

    @property
    def hidden(self) -> int:
        return self.mean.shape[0]

    @property
    def reader(self) -> Reader:
        return MeanReader(self.layer)

    def stake(self, query: Tensor) -> float:
        assert self.gate is not None
        return float((query - self.mean) / self.std @ self.gate[:-1] + self.gate[-1])

    def scores(self, query: Tensor, profile: Tensor | None) -> Tensor:
        feature = (query - self.mean) / self.std
        if profile is not None:
            hint = (profile - self.profile_mean) / self.profile_std
            feature = QUERY_SHARE * feature + (1 - QUERY_SHARE) * hint
        return self.rule(feature, self.learned)

    def shapes(self) -> dict[str, list[int]]:
        wide = {name: [self.hidden] for name in ("mean", "std", "profile_mean", "profile_std")}
        learned = [len(self.experts), self.hidden + (self.kind == "linear")]
        return {**wide, "gate": [self.hidden + 1], "learned": learned}


class CentroidRouter(MeanRouter):
    """The paper's rule: the nearer an expert's feature by L1 distance, the better. `learned` are those features, `[experts, hidden]`."""

    kind = "centroid"

    @staticmethod
    def rule(feature: Tensor, learned: Tensor) -> Tensor:
        return -(feature[..., None, :] - learned).abs().mean(-1)  # a mean: the temperature is then no matter of width


class LinearRouter(MeanRouter):
    """A linear map from features to experts. `learned` is its matrix, `[experts, hidden + 1]`, the bias last."""

    kind = "linear"

    @staticmethod
    def rule(feature: Tensor, learned: Tensor) -> Tensor:
        return feature @ learned[:, :-1].T + learned[:, -1]


KINDS: dict[str, type[Router]] = {kind.kind: kind for kind in (TokenRouter, CentroidRouter, LinearRouter)}


def load_router(folder: str | Path) -> Router | None:
    """The router in a committee's folder; None where it has none.

    Raises:
        WhispersError: a file that is damaged, of another kind or version, or whose tensors do not fit each other.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})[_META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        kind, version = meta.pop("kind"), meta.pop("version")
        if kind not in KINDS or version != VERSION:
            raise WhispersError(
                f"{path}: a router of kind {kind!r}, version {version!r}; accepted: {', '.join(KINDS)}, version {VERSION}"
            )
        meta["experts"] = tuple((str(name), str(content)) for name, content in meta["experts"])
        router = KINDS[kind](**{"gate": None, **meta, **tensors})
        _check(router)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise WhispersError(f"{path}: no router that can be read: {error!r}; accepted: what a router saved") from error
    return router


def _check(router: Router) -> None:
    """Raises ValueError for values that do not fit each other."""
    for name, shape in router.shapes().items():
        value = getattr(router, name)
        if value is None and name == "gate":
            continue
        if list(value.shape) != shape or value.dtype != torch.float32 or not bool(value.isfinite().all()):
            raise ValueError(f"{name} is {list(value.shape)} {value.dtype}; float32 {shape}, finite, wanted")
    if not (router.temperature > 0 and 0 <= router.confidence <= 1 and router.layer >= 0 and len(router.experts) > 0):
        raise ValueError("temperature, confidence, layer or experts out of range")
    if isinstance(router, MeanRouter) and not bool((router.std > 0).all() and (router.profile_std > 0).all()):
        raise ValueError("a standard deviation is not above 0")
    if isinstance(router, TokenRouter) and not (router.gate_scale > 0 and math.isfinite(router.gate_shift)):
        raise ValueError("the gate's scale or shift is out of range")
    if isinstance(router, TokenRouter) and not (router.floor is None or 0 <= router.floor < math.inf):
        raise ValueError("the floor is out of range")
