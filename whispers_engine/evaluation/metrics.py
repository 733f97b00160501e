"""The figures, as functions of arrays. Options stand on the last axis; one that is not there (padding) has probability 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
_TIE = 1e-9  # probabilities this close are equal


def similarity(p: Floats, q: Floats) -> Floats:
    """1 - Jensen-Shannon distance, base 2: 1 for equal distributions, 0 for those that share no option.

    The distance is the square root of the divergence, `JSD = H((p + q) / 2) - (H(p) + H(q)) / 2` in bits.

    Args:
        p, q: float64 `[..., options]`, each summing to one; broadcast against each other.
    """
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return 1 - np.sqrt(np.clip(divergence, 0, 1))  # rounding can leave the range


def _relative_entropy(p: Floats, middle: Floats) -> Floats:
    p, middle = np.broadcast_arrays(p, middle)
    ratio = np.divide(p, middle, out=np.ones_like(middle), where=p > 0)  # 0 log 0 = 0
    return (p * np.log2(ratio)).sum(-1)


def accuracy(p: Floats, answer: Floats, chosen: NDArray[np.int64] | None = None) -> Floats:
    """Whether the likeliest option is the answer: 1 or 0, and a part where several are likeliest (one of them is taken at random).

    Args:
        p: float64 `[..., options]`.
        answer: float64 `[..., options]`, 1 at the answer, else 0.
        chosen: int64 `[...]`, an option that something else than `p` has chosen; below 0: none.
    """
    best = p >= p.max(-1, keepdims=True) - _TIE
    right = (best * answer).sum(-1) / best.sum(-1)
    if chosen is None:
        return right
    taken = np.take_along_axis(answer, np.maximum(chosen, 0)[..., None], -1)[..., 0]
    return np.where(chosen >= 0, taken, right)


def skill(score: Floats, uniform: Floats) -> Floats:
    """How much of the way from guessing to perfection: 0 for a score that is uniform's, 1 for a perfect one; NaN where guessing is perfect.

    Args:
        score, uniform: float64 of one shape.
    """
    return np.divide(score - uniform, 1 - uniform, out=np.full_like(score, np.nan), where=uniform < 1)


@dataclass(frozen=True)
class Bin:
    """Predictions of about the same confidence."""

    n: int
    confidence: float  # mean
    share: float  # of them that came true


def reliability(confidence: Floats, outcome: Floats, bins: int = 10) -> list[Bin]:
    """Predictions in bins of equal width over [0, 1]; empty bins are left out.

    Args:
        confidence: float64 `[n]`, in [0, 1].
        outcome: float64 `[n]`, 1 where the prediction came true, 0 where not, or the share of cases in which it did.
    """
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    found = []
    for at in range(bins):
        mine = index == at
        if mine.any():
            found.append(Bin(int(mine.sum()), float(confidence[mine].mean()), float(outcome[mine].mean())))
    return found


def expected_calibration_error(bins: list[Bin]) -> float:
    """ECE: the mean gap between confidence and share over the bins, each weighing what it holds; NaN for none."""
    total = sum(one.n for one in bins)
    return sum(one.n * abs(one.confidence - one.share) for one in bins) / total if total else float("nan")


def wins(positive: Floats, negative: Floats) -> Floats:
    """`[positives, negatives]`: 1 where the positive one scores higher, 1/2 where they tie. Its mean is the AUROC."""
    above = positive[:, None] - negative[None, :]
    return np.sign(above) / 2 + 0.5


def auroc(positive: Floats, negative: Floats) -> float:
    """How often a positive scores above a negative, ties counting half; NaN where either is missing."""
    return float(wins(positive, negative).mean()) if len(positive) and len(negative) else float("nan")


def entropy_bits(weights: Floats) -> float:
    """Of the shares that weights are of their sum; 0 for none."""
    shares = weights[weights > 0] / weights.sum() if weights.sum() > 0 else np.zeros(0)
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def relevant_share(asked: list[str | None], culture: str) -> float:
    """The share of the experts asked that speak for the culture in question; 0 where none is asked.

    This is the score that the method's paper reports as cultural alignment. It looks at who was asked, not at what was answered.
    """
    return asked.count(culture) / len(asked) if asked else 0.0


def completeness(p: Floats) -> float:
    """The share of questions that got an answer: probabilities that are numbers. With options it is 1 by construction."""
    return float(np.isfinite(p).all(-1).mean()) if len(p) else float("nan")
