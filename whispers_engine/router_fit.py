"""Makes routers from examples: questions with the culture that they concern. The token kind's own training is in `router_tokens`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .errors import WhispersError
from .router import KINDS, MeanRouter, Router, TokenRouter, floored, profile_text
from .router_examples import ANY, Example
from .router_tokens import PENALTIES, Tokens, calibrate, folds, learn, ticks, unstandardised

if TYPE_CHECKING:
    from .engine import Engine
    from .experts import Expert

RIDGE = 4.0  # times the number of examples: with 576 standardised features and 260 examples, 1 to 10 do about as well
GATE_RIDGE = 1.0
CONFIDENCE = 0.2
_FOLDS = 4
_AT_ONCE = 16  # questions that are read together, for the progress
_TEMPERATURES = torch.logspace(-2.5, 1, 36, dtype=torch.float64).tolist()
_FLOORS = torch.arange(0, 6.25, 0.25, dtype=torch.float64).tolist()  # nats above the median


@dataclass(frozen=True)
class Fitted:
    """A router, and how often it names the right expert first, or among its first three, for an example that was held out; and how surely
    its gate tells what was held out apart (None: not measured, or no gate)."""

    router: Router
    examples: int
    top1: float
    top3: float
    gate_auroc: float | None = None


def fit_router(
    engine: Engine,
    examples: Sequence[Example],
    kind: str = "token",
    layer: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    calibration: Sequence[Example] = (),
) -> Fitted:
    """Makes a router for an engine's experts.

    Args:
        examples: every expert without an example of its culture stays unknown to the router; examples without a culture teach the gate.
            Of those that concern an expert's culture there are two an expert at least, on the average.
        kind: "token", by what every token says; "linear", a least-squares fit to the mean state; "centroid", the paper's rule.
        layer: of the base, 0 to its number of layers; None: the best for the shipped base, a little above the middle for the token
            kind, four fifths of the way up for the others.
        progress: called with the number of steps done, and of all: examples that were read, and fits.
        calibration: of the token kind, questions such as people ask: the weights are made as sure as they are right on those that concern
            an expert, and on what is held out of the examples, half each. Without, on the latter alone, which is harder where the
            examples seek out what is little known.

    Raises:
        WhispersError: another kind, a layer that is not there, a culture that no expert speaks for or, with examples, several, too few
            examples, or a calibration that concerns no expert, asks what an example asks, or is for another kind.
    """
    if kind not in KINDS:
        raise WhispersError(f"router: kind {kind!r}; accepted: {', '.join(KINDS)}")
    if layer is None:
        layer = engine.model.config.num_layers * (8 if kind == "token" else 12) // 15
    experts = [engine.expert(name) for name in engine.experts]
    cultures = {expert.culture or expert.name for expert in experts}
    for example in (*examples, *calibration):
        if example.culture not in (None, ANY) and example.culture not in cultures:
            raise WhispersError(
                f"router: an example concerns {example.culture!r}; accepted: {', '.join(sorted(cultures))}, {ANY!r} or null"
            )
    named = {example.culture for example in examples}
    known = [expert for expert in experts if (expert.culture or expert.name) in named]
    of: dict[str, str] = {}
    for expert in known:
        culture = expert.culture or expert.name
        if culture in of:
            raise WhispersError(
                f"router: the experts {of[culture]!r} and {expert.name!r} both speak for {culture!r}; accepted: one expert a culture "
                "that examples concern"
            )
        of[culture] = expert.name
    concerned = sum(example.culture in of for example in examples)
    if len(known) < 2 or concerned < 2 * len(known):
        raise WhispersError(
            f"router: {concerned} examples that concern the cultures of {len(known)} experts; accepted: two an expert on the average, "
            "for two experts at least"
        )
    mine = [example for example in calibration if example.culture in of]
    if calibration and (kind != "token" or not mine):
        raise WhispersError(
            f"router: a calibration of {len(mine)} questions that concern an expert, for the kind {kind!r}; accepted: one at least, "
            "for 'token'"
        )
    if both := {example.question for example in mine} & {example.question for example in examples}:
        raise WhispersError(f"router: the calibration asks {min(both)!r}, an example; accepted: other questions")

    questions = [example.question for example in examples]
    if kind == "token":
        states: list[Tensor] = []
        total = len(questions) + 2 * ticks()
        for first in range(0, len(questions), _AT_ONCE):
            states += engine.read_tokens(questions[first : first + _AT_ONCE], layer)
            progress(len(states), total)
        done = itertools.count(len(states) + 1)
        apart = engine.read_tokens([example.question for example in mine], layer) if mine else []
        fitted = fit_tokens(known, examples, states, layer, lambda: progress(next(done), total), apart=(mine, apart))
        progress(total, total)
        return fitted
    features = _read(engine, questions, layer, progress)
    profiles = _read(engine, [profile_text({"country": expert.culture or expert.name}) for expert in known], layer)
    return fit_features(known, examples, features, profiles, kind, layer)


def fit_tokens(
    known: Sequence[Expert],
    examples: Sequence[Example],
    states: Sequence[Tensor],
    layer: int,
    tick: Callable[[], None] = lambda: None,
    penalties: Sequence[float] = PENALTIES,
    apart: tuple[Sequence[Example], Sequence[Tensor]] = ((), ()),
) -> Fitted:
    """Makes a token router from what was read.

    Args:
        known: experts, an example of each one's culture at least among `examples`.
        states: float32 `[tokens, hidden]` of each example.
        layer: as `fit_router`'s.
        tick: called after every fit.
        penalties: of which the best on what is held out is taken.
        apart: questions that each concern an expert, none of them an example, and their states, to calibrate with.
    """
    of = _of(known, examples)
    mine, at_stake = of.any(1), torch.tensor([example.culture is not None for example in examples])
    open_to_all = torch.tensor([example.culture == ANY for example in examples])
    tokens = Tokens.join(states)
    mean, std = tokens.states.mean(0), tokens.states.std(0).clamp_min(1e-6)
    tokens = Tokens((tokens.states - mean) / std, tokens.of, tokens.count)
    fold = folds([example.place or example.question for example in examples])

    # Where none is named, all experts are as likely as each other: a common word says nothing of any.
    taught = mine | open_to_all
    target = torch.where(mine[:, None], of.double(), 1 / len(known))[taught]

    def experts_loss(scores: Tensor, chosen: Tensor) -> Tensor:
        return -(target[chosen] * scores.log_softmax(1)).sum(1).mean()

    named, right = mine[taught], of[mine]
    # Calibrated as people are taken to ask: as often for a country or its people by name as for one of its places.
    by_place = torch.tensor([example.place is not None for example in examples])[mine]
    share = torch.stack([part.double() / part.sum().clamp_min(1) for part in (by_place, ~by_place)]).sum(0)

    def off(held_out: Tensor) -> float:
        return _calibrate(held_out[named], right, share)[1]

    chosen = learn(tokens.part(taught), fold[taught], len(known), experts_loss, off, tick, penalties)
    held_out = chosen.held_out[named]
    gate, scale, shift, auroc = None, 1.0, 0.0, None
    if not bool(at_stake.all()):
        # Half the weight for what is neutral; the questions that name a culture and those that name none share the rest.
        sorts = [part for part in (mine, at_stake & ~mine) if bool(part.any())]
        weights = (~at_stake).double() / (~at_stake).sum() / 2
        weights = weights + torch.stack([part.double() / part.sum() / 2 / len(sorts) for part in sorts]).sum(0)

        length = (
            tokens.of.bincount(minlength=tokens.count).double().log()
        )  # of the mean, not the sum, of the exponentials

        def gate_loss(scores: Tensor, chosen: Tensor) -> Tensor:
            share = weights[chosen] / weights[chosen].sum()
            scores = scores[:, 0] - length[chosen]
            return binary_cross_entropy_with_logits(scores, at_stake[chosen].double(), share, reduction="sum")

        def gate_off(held_out: Tensor) -> float:
            return calibrate(held_out[:, 0] - length, at_stake, weights)[2]

        opened = learn(tokens, fold, 1, gate_loss, gate_off, tick, penalties)
        gate = unstandardised(opened.weight, mean, std)[0].contiguous()
        scores = opened.held_out[:, 0] - length
        scale, shift, _ = calibrate(scores, at_stake, weights)
        high, low = scores[at_stake][:, None], scores[~at_stake][None]
        auroc = float((high > low).double().mean() + (high == low).double().mean() / 2)
    scores, wanted, about, share = chosen.held_out, target, named, share / share.sum()
    if apart[0]:  # half each: what people ask, and the harder ones that are held out
        others = Tokens.join(apart[1])
        asked = Tokens((others.states - mean) / std, others.of, others.count).scores(chosen.weight)
        scores = torch.cat([asked, scores])
        wanted = torch.cat([_of(known, apart[0]).double(), wanted])
        about = torch.cat([torch.ones(len(asked), dtype=torch.bool), about])
        share = torch.cat([torch.full((len(asked),), 1 / len(asked)).double(), share])
    temperature, floor = calibrate_floor(scores, wanted, about, share)
    router = TokenRouter(
        experts=tuple((expert.name, expert.content_hash) for expert in known),
        layer=layer,
        temperature=temperature,
        floor=floor,
        confidence=CONFIDENCE,
        gate=gate,
        learned=unstandardised(chosen.weight, mean, std),
        gate_scale=scale,
        gate_shift=shift,
    )
    best = right.gather(1, held_out.topk(min(3, len(known))).indices)
    return Fitted(router, len(examples), float(best[:, 0].float().mean()), float(best.any(1).float().mean()), auroc)


def _of(known: Sequence[Expert], examples: Sequence[Example]) -> Tensor:
    """Which example is whose, bool `[examples, experts]`."""
    return torch.tensor(
        [[example.culture == (expert.culture or expert.name) for expert in known] for example in examples]
    )


def fit_features(
    known: Sequence[Expert], examples: Sequence[Example], features: Tensor, profiles: Tensor, kind: str, layer: int
) -> Fitted:
    """Makes a router of one of the other kinds from what was read.

    Args:
        known: experts, an example of each one's culture at least among `examples`.
        features: float32 `[examples, hidden]`.
        profiles: float32 `[experts, hidden]`, of profiles that name each one's culture.
        kind, layer: as `fit_router`'s.
    """
    of = _of(known, examples)
    mine = of.any(1)  # examples of one culture
    mean, std = features[mine].mean(0), _spread(features[mine])
    standard = (features - mean) / std
    learned, held_out = _fit_and_hold_out(kind, standard[mine], of[mine].float())
    at_stake = torch.tensor([example.culture is not None for example in examples])
    shared: dict[str, Any] = {
        "experts": tuple((expert.name, expert.content_hash) for expert in known),
        "layer": layer,
        "temperature": _calibrate(held_out, of[mine], torch.ones(int(mine.sum())))[0],
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
    for first in range(0, len(questions), _AT_ONCE):
        found.append(engine.read(questions[first : first + _AT_ONCE], layer))
        progress(min(first + _AT_ONCE, len(questions)), len(questions))
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
    question about another culture is held out too. Where a fold holds all there is, nothing is left to learn from: its scores are 0.
    """
    fold = ((targets.cumsum(0) - 1) * targets).sum(1).long() % _FOLDS
    scores = torch.zeros_like(targets)
    for index in range(_FOLDS):
        out = fold == index
        if bool(out.all()):
            break
        scores[out] = _mean_kind(kind).rule(features[out], _fit(kind, features[~out], targets[~out]))
    return _fit(kind, features, targets), scores.double()


def _mean_kind(kind: str) -> type[MeanRouter]:
    found = KINDS[kind]
    assert issubclass(found, MeanRouter)
    return found


def _fit_gate(features: Tensor, at_stake: Tensor) -> Tensor:
    """Weights and bias `[hidden + 1]`: 1 where culture is at stake, -1 where not, both sides of equal weight."""
    share = torch.where(at_stake, 0.5 / at_stake.sum(), 0.5 / (~at_stake).sum()).double() * len(features)
    targets = at_stake.float()[:, None] * 2 - 1
    return _ridge(_with_bias(features), targets, GATE_RIDGE * len(features), share)[0]


def _calibrate(held_out: Tensor, of: Tensor, weights: Tensor) -> tuple[float, float]:
    """The temperature under which the right experts of held-out examples are likeliest, and how unlikely they are then."""

    def loss(temperature: float) -> float:
        return -float((held_out / temperature).log_softmax(-1)[of].double() @ weights.double() / weights.sum())

    best = min(_TEMPERATURES, key=loss)
    return best, loss(best)


def calibrate_floor(scores: Tensor, target: Tensor, named: Tensor, share: Tensor) -> tuple[float, float | None]:
    """The temperature and the floor under which questions are likeliest: those that name an expert's culture by the right one, and
    those that name nobody by all alike; either sort counts half. None without any of these: nothing tells how high it should be.

    Args:
        scores, target: float64 `[questions, experts]`; scores of what was not learned from.
        named: bool `[questions]`.
        share: float64, what each of the named counts.
    """
    if bool(named.all()):
        return _calibrate(scores, target > 0, share)[0], None
    weights = torch.full((len(named),), 1 / float((~named).sum()), dtype=torch.float64)
    weights[named] = share.double() / share.sum()

    def loss(values: tuple[float, float]) -> float:
        temperature, floor = values
        logp = (floored(scores, floor, temperature) / temperature).log_softmax(-1)
        return -float((target * logp).sum(-1) @ weights)

    return min(itertools.product(_TEMPERATURES, _FLOORS), key=loss)
