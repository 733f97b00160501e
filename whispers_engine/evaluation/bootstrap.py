"""Paired bootstrap, clustered by question: questions are drawn again and again, each with everything that was measured of it.

The same draws serve every row and culture, so that a difference between rows has an interval of its own: rows are measured on the same
questions, and most of their spread is the questions', which cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .metrics import Floats

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, and how much it is a mean of."""

    n: int
    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain numbers; None for what there is not."""
        return {"n": self.n, "mean": finite(self.mean), "low": finite(self.low), "high": finite(self.high)}


def finite(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


@dataclass(frozen=True)
class Draws:
    """Means of the data and of every resample."""

    n: NDArray[np.int64]  # [groups]
    mean: Floats  # [groups]; NaN where there is nothing
    draws: Floats  # [resamples, groups]

    def estimate(self, group: int = 0) -> Estimate:
        return estimate(int(self.n[group]), float(self.mean[group]), self.draws[:, group])


def estimate(n: int, mean: float, draws: Floats) -> Estimate:
    """The percentile interval. Resamples that hold nothing of it (NaN) are left out."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return Estimate(n, mean, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(n, mean, float(low), float(high))


class Resampler:
    """Draws of `clusters` questions with replacement, the same for whatever is asked of it.

    Args:
        clusters: questions.
        resamples: how many draws.
        seed: the same seed, the same draws.
    """

    def __init__(self, clusters: int, resamples: int = RESAMPLES, seed: int = 0):
        generator = np.random.default_rng(seed)
        even = np.full(clusters, 1 / clusters)
        # [resamples, clusters]: how often each question is in each draw
        self.counts: Floats = generator.multinomial(clusters, even, size=resamples).astype(np.float64)

    def means(
        self, scores: Floats, cluster: NDArray[np.int64], group: NDArray[np.int64] | None = None, groups: int = 1
    ) -> Draws:
        """Means over pairs, by group.

        Args:
            scores: float64 `[pairs]`; NaN: not measured, no part of any mean.
            cluster: int64 `[pairs]`, each one's question.
            group: int64 `[pairs]`, each one's group (a culture); None: all are in one.
        """
        known = np.isfinite(scores)
        group = np.zeros(len(scores), np.int64) if group is None else group
        clusters = self.counts.shape[1]
        cell = cluster[known] * groups + group[known]
        shape = (clusters, groups)
        sums = np.bincount(cell, scores[known], clusters * groups).reshape(shape)  # [clusters, groups]
        sizes = np.bincount(cell, minlength=clusters * groups).reshape(shape).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):  # an empty group's mean is NaN
            mean = sums.sum(0) / sizes.sum(0)
            draws = (self.counts @ sums) / (self.counts @ sizes)
        return Draws(sizes.sum(0).astype(np.int64), mean, draws)

    def macro(self, by_group: Draws) -> Estimate:
        """The mean of the groups' means, each weighing the same; groups without pairs are left out.

        A resample that holds nothing of a group is left out of the interval: its mean would be of other groups than the data's. Where
        most are, what is left speaks for none, and there is no interval.
        """
        there = by_group.n > 0
        if not there.any():
            return Estimate(0, float("nan"), float("nan"), float("nan"))
        draws = by_group.draws[:, there].mean(1)  # NaN where a group is missing
        known = draws[np.isfinite(draws)]
        enough = len(known) >= len(draws) / 2
        mean = float(by_group.mean[there].mean())
        return estimate(int(by_group.n.sum()), mean, known if enough else known[:0])

    def auroc(self, wins: Floats, positive: NDArray[np.int64], negative: NDArray[np.int64]) -> Estimate:
        """Of a matrix `[positives, negatives]` of wins; `positive` and `negative` say which question each row and column is."""
        rows, columns = self.counts[:, positive], self.counts[:, negative]
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = ((rows @ wins) * columns).sum(1) / (rows.sum(1) * columns.sum(1))
        return estimate(wins.size, float(wins.mean()), draws)
