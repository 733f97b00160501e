"""Routers: which experts a question concerns, with which weights, and whether culture is at stake in it at all.

A router reads the mean of the hidden states over the user's own words at one layer of the base, which the context's own pass computes
anyway. Both kinds score experts on standardised features; what they share is here once, and each adds its rule.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import WhispersError

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
    """What both kinds of router share.

    Args:
        experts: name and content hash of every expert it knows. An expert whose soft prompt has changed is not the one it knows.
        layer: which of the base's hidden states it reads, 0 to the number of layers.
        temperature: of the softmax over experts; above 0.
        confidence: where the likeliest expert's probability among all it may choose stays below this, the chosen ones get equal weights.
        mean, std: float32 `[hidden]`, the statistics that a query's feature is standardised with.
        profile_mean, profile_std: likewise, a profile's: short lines of keys and values lie elsewhere than questions.
        gate: float32 `[hidden + 1]`, weights and bias on the standardised query; positive: culture is at stake. None: it always is.
        learned: float32, what the rule compares features with.
    """

    experts: tuple[tuple[str, str], ...]
    layer: int
    temperature: float
    confidence: float
    mean: Tensor
    std: Tensor
    profile_mean: Tensor
    profile_std: Tensor
    gate: Tensor | None
    learned: Tensor

    kind: ClassVar[str]

    @staticmethod
    @abstractmethod
    def rule(feature: Tensor, learned: Tensor) -> Tensor:
        """Of standardised features `[..., hidden]`: one score an expert, `[..., experts]`; larger is nearer."""

    def knows(self, expert: Expert) -> bool:
        return (expert.name, expert.content_hash) in self.experts

    def at_stake(self, query: Tensor) -> bool:
        """Whether a query with this feature, float32 `[hidden]`, concerns culture at all."""
        return self.gate is None or float(self._standard(query) @ self.gate[:-1] + self.gate[-1]) > 0

    def route(self, query: Tensor, profile: Tensor | None, names: Sequence[str], top_k: int) -> list[tuple[str, float]]:
        """Chooses among `names`, all of them known; returns names with weights that sum to one, heaviest first.

        Args:
            query: float32 `[hidden]`, the context's feature.
            profile: float32 `[hidden]`, the profile's feature, or None.
            top_k: how many are chosen at most.
        """
        feature = self._standard(query)
        if profile is not None:
            hint = (profile - self.profile_mean) / self.profile_std
            feature = QUERY_SHARE * feature + (1 - QUERY_SHARE) * hint
        index = {name: at for at, (name, _) in enumerate(self.experts)}
        scores = self.rule(feature, self.learned)[[index[name] for name in names]].double() / self.temperature
        best, order = scores.sort(descending=True, stable=True)
        sure = float(scores.softmax(0).max()) >= self.confidence
        chosen = best[:top_k].softmax(0) if sure else torch.full_like(best[:top_k], 1 / len(best[:top_k]))
        return [(names[at], weight) for at, weight in zip(order.tolist(), chosen.tolist(), strict=False)]

    def _standard(self, query: Tensor) -> Tensor:
        return (query - self.mean) / self.std

    def save(self, folder: str | Path) -> None:
        """Writes `router.safetensors` into a committee's folder, whole or not at all."""
        tensors = {name: value.contiguous() for name, value in self._fields().items() if isinstance(value, Tensor)}
        meta = {name: value for name, value in self._fields().items() if not isinstance(value, Tensor | None)}
        text = json.dumps({"kind": self.kind, "version": VERSION, **meta})
        partial = Path(folder) / f".{FILE}.partial"
        save_file(tensors, partial, metadata={_META: text})
        partial.chmod(0o644)  # temporary files are private; results are not
        partial.replace(Path(folder) / FILE)

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class CentroidRouter(Router):
    """The paper's rule: the nearer an expert's feature by L1 distance, the better. `learned` are those features, `[experts, hidden]`."""

    kind = "centroid"

    @staticmethod
    def rule(feature: Tensor, learned: Tensor) -> Tensor:
        return -(feature[..., None, :] - learned).abs().mean(-1)  # a mean: the temperature is then no matter of width


class LinearRouter(Router):
    """A linear map from features to experts. `learned` is its matrix, `[experts, hidden + 1]`, the bias last."""

    kind = "linear"

    @staticmethod
    def rule(feature: Tensor, learned: Tensor) -> Tensor:
        return feature @ learned[:, :-1].T + learned[:, -1]


KINDS: dict[str, type[Router]] = {kind.kind: kind for kind in (CentroidRouter, LinearRouter)}


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
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise WhispersError(f"{path}: no router that can be read: {error!r}; accepted: what a router saved") from error
    return router


def _check(router: Router) -> None:
    """Raises ValueError for values that do not fit each other."""
    wide, count = router.mean.shape[0], len(router.experts)
    shapes = {"mean": [wide], "std": [wide], "profile_mean": [wide], "profile_std": [wide], "gate": [wide + 1]}
    shapes["learned"] = [count, wide + (router.kind == "linear")]
    for name, value in vars(router).items():
        if not isinstance(value, Tensor):
            continue
        if list(value.shape) != shapes[name] or value.dtype != torch.float32 or not bool(value.isfinite().all()):
            raise ValueError(f"{name} is {list(value.shape)} {value.dtype}; float32 {shapes[name]}, finite, wanted")
    if not (router.temperature > 0 and 0 <= router.confidence <= 1 and router.layer >= 0 and count > 0):
        raise ValueError("temperature, confidence, layer or experts out of range")
    if not bool((router.std > 0).all() and (router.profile_std > 0).all()):
        raise ValueError("a standard deviation is not above 0")
