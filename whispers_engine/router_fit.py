"""Makes routers from examples: questions with the culture that they concern."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import WhispersError
from .router import KINDS, Router, profile_text

if TYPE_CHECKING:
    from .engine import Engine
    from .experts import Expert

ANY = "*"  # culture is at stake, but none is named
RIDGE = 4.0  # times the number of examples: with 576 standardised features and 260 examples, 1 to 10 do about as well
GATE_RIDGE = 1.0
CONFIDENCE = 0.2
_FOLDS = 4
_TEMPERATURES = torch.logspace(-2.5, 1, 36, dtype=torch.float64).tolist()


@dataclass(frozen=True)
class Example:
    """A question, and the culture that it concerns: an expert's, `ANY`, or None where culture is not at stake."""

    question: str
    culture: str | None


@dataclass(frozen=True)
class Fitted:
    """A router, and how often it names the right expert first, or among its first three, for an example that it has not seen."""

    router: Router
    examples: int
    top1: float
    top3: float


def read_examples(path: str | Path) -> list[Example]:
    """Reads examples, one JSON object a line: `{"question": ..., "culture": ...}`, the culture null where none is at stake.

    Raises:
        WhispersError: a file that cannot be read, or a line that is no example: names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WhispersError(f"{path}: cannot be read: {error}; accepted: a file of examples") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            question, culture = value["question"], value["culture"]
            right = isinstance(question, str) and question.strip() and isinstance(culture, str | None)
        except (ValueError, TypeError, KeyError):
            right = False
        if not right:
            raise WhispersError(
                f'{path}:{number}: is no example; accepted: {{"question": a text, "culture": an expert\'s, "{ANY}" or null}}'
            )
        examples.append(Example(question, culture))
    return examples


def fit_router(
    engine: Engine,
    examples: Sequence[Example],
    kind: str = "linear",
    layer: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fitted:
    """Makes a router for an engine's experts.

    Args:
        examples: every expert without an example of its culture stays unknown to the router; examples without a culture teach the gate.
        kind: "centroid", the paper's rule; "linear", a least-squares fit.
        layer: of the base, 0 to its number of layers; None: four fifths of the way up, which is best for the shipped base.
        progress: called with the number of examples read, and of all.

    Raises:
        WhispersError: another kind, a layer that is not there, a culture that no expert speaks for, or too few examples.
    """
    if kind not in KINDS:
        raise WhispersError(f"router: kind {kind!r}; accepted: {', '.join(KINDS)}")
    layer = engine.model.config.num_layers * 4 // 5 if layer is None else layer
    experts = [engine.expert(name) for name in engine.experts]
    cultures = {expert.culture or expert.name for expert in experts}
    for example in examples:
        if example.culture not in (None, ANY) and example.culture not in cultures:
            raise WhispersError(
                f"router: an example concerns {example.culture!r}; accepted: {', '.join(sorted(cultures))}, {ANY!r} or null"
            )
    named = {example.culture for example in examples}
    known = [expert for expert in experts if (expert.culture or expert.name) in named]
    if len(known) < 2 or len(examples) < 2 * len(known):
        raise WhispersError(
            f"router: {len(examples)} examples for {len(known)} experts; accepted: two an expert on the average, for two experts at least"
        )

    features = _read(engine, [example.question for example in examples], layer, progress)
    profiles = _read(engine, [profile_text({"country": expert.culture or expert.name}) for expert in known], layer)
    return fit_features(known, examples, features, profiles, kind, layer)


def fit_features(
    known: Sequence[Expert], examples: Sequence[Example], features: Tensor, profiles: Tensor, kind: str, layer: int
) -> Fitted:
    """Makes a router from what was read.

    Args:
        known: experts, an example of each one's culture at least among `examples`.
        features: float32 `[examples, hidden]`.
        profiles: float32 `[experts, hidden]`, of profiles that name each one's culture.
        kind, layer: as `fit_router`'s.
    """
    of = torch.tensor(
        [[example.culture == (expert.culture or expert.name) for expert in known] for example in examples]
    )
    mine = of.any(1)  # examples of one culture
    mean, std = features[mine].mean(0), _spread(features[mine])
    standard = (features - mean) / std
    learned, held_out = _fit_and_hold_out(kind, standard[mine], of[mine].float())
    at_stake = torch.tensor([example.culture is not None for example in examples])
    shared: dict[str, Any] = {
        "experts": tuple((expert.name, expert.content_hash) for expert in known),
        "layer": layer,
        "temperature": _calibrate(held_out, of[mine]),
        "confidence": CONFIDENCE,
        "mean": mean,
        "std": std,
        "profile_mean": profiles.mean(0),
        "profile_std": _spread(profiles),
        "gate": None if bool(at_stake.all()) else _fit_gate(standard, at_stake),
    }
    best = held_out.topk(min(3, len(known))).indices
    right = of[mine].gather(1, best)
    router = KINDS[kind](**shared, learned=learned)
    return Fitted(router, len(examples), float(right[:, 0].float().mean()), float(right.any(1).float().mean()))


def _read(
    engine: Engine,
    questions: Sequence[str],
    layer: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Features, float32 `[questions, hidden]`; some at a time, for the progress."""
    found = []
    for first in range(0, len(questions), 16):
        found.append(engine.read(questions[first : first + 16], layer))
        progress(min(first + 16, len(questions)), len(questions))
    return torch.cat(found)


def _spread(features: Tensor) -> Tensor:
    return features.std(0).clamp_min(
        1e-6
    )  # a feature that never changes tells nothing, and is no reason to divide by 0


def _with_bias(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones(len(features), 1)], dim=1)


def _ridge(rows: Tensor, targets: Tensor, strength: float, weights: Tensor) -> Tensor:
    """Least squares with a penalty on all but the bias: float32 `[columns of targets, columns of rows]`."""
    rows, targets = rows.double(), targets.double()
    normal = rows.T @ (rows * weights[:, None])
    normal.diagonal()[:-1] += strength
    return torch.linalg.solve(normal, rows.T @ (targets * weights[:, None])).T.float().contiguous()


def _fit(kind: str, features: Tensor, targets: Tensor) -> Tensor:
    """What a router of this kind learns from `[examples, hidden]` and `[examples, experts]` of zeros and ones."""
    if kind == "centroid":
        return targets.T @ features / targets.sum(0).clamp_min(1)[:, None]
    ones = torch.ones(len(features), dtype=torch.float64)
    return _ridge(_with_bias(features), targets, RIDGE * len(features), ones)


def _fit_and_hold_out(kind: str, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What it learns from all, and the scores `[examples, experts]` of every example by what was learned without its fold.

    Folds go by an example's place among those of its expert: where every culture has the same questions in the same order, the same
    question about another culture is held out too.
    """
    fold = ((targets.cumsum(0) - 1) * targets).sum(1).long() % _FOLDS
    scores = torch.empty_like(targets)
    for index in range(_FOLDS):
        out = fold == index
        scores[out] = KINDS[kind].rule(features[out], _fit(kind, features[~out], targets[~out]))
    return _fit(kind, features, targets), scores.double()


def _fit_gate(features: Tensor, at_stake: Tensor) -> Tensor:
    """Weights and bias `[hidden + 1]`: 1 where culture is at stake, -1 where not, both sides of equal weight."""
    share = torch.where(at_stake, 0.5 / at_stake.sum(), 0.5 / (~at_stake).sum()).double() * len(features)
    targets = at_stake.float()[:, None] * 2 - 1
    return _ridge(_with_bias(features), targets, GATE_RIDGE * len(features), share)[0]


def _calibrate(held_out: Tensor, of: Tensor) -> float:
    """The temperature under which the right experts of held-out examples are likeliest."""

    def loss(temperature: float) -> float:
        return -float((held_out / temperature).log_softmax(-1)[of].mean())

    return min(_TEMPERATURES, key=loss)
