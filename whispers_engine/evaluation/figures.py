"""Figures of rows: means with intervals, by culture and pooled, differences, calibration, every culture by every expert."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from .bootstrap import Resampler, estimate, finite
from .cast import BASE, Cast, Team
from .data import Dataset, Pairs
from .metrics import (
    Floats,
    accuracy,
    completeness,
    expected_calibration_error,
    relevant_share,
    reliability,
    similarity,
    skill,
)
from .routing import Router
from .rows import Answers, Row, Scores, answer_all, asks_all


class Section:
    """One metric's figures, over the pairs of its form.

    Args:
        pairs: of the form "dist", measured by similarity, or "answer", measured by accuracy.
        rows: the first of them is uniform's.
        routers: by their committee's label.
    """

    def __init__(
        self,
        dataset: Dataset,
        cast: Cast,
        routers: dict[str, Router],
        pairs: Pairs,
        rows: Sequence[Row],
        scores: Scores,
        resampler: Resampler,
    ):
        self._dataset = dataset
        self._cast = cast
        self._routers = routers
        self._pairs = pairs
        self._option_scores = scores
        self._resampler = resampler
        self._answers = [answer_all(row, dataset, pairs) for row in rows]
        self._scores = {one.row.key: self._score(one) for one in self._answers}

    def to_dict(self) -> dict[str, Any]:
        teams = [team for team in self._cast.teams if asks_all(team, self._routers.get(team.label))]
        return {
            "pairs": len(self._pairs),
            "questions": len(set(self._pairs.item.tolist())),
            "rows": [self._row(one) for one in self._answers],
            "differences": [self._difference(a, b) for a, b in combinations(self._scores, 2)],
            "matrices": [self._matrix(team) for team in teams],
        }

    def _metric(self, p: Floats, chosen: Any = None) -> Floats:
        """float64 `[pairs]` of `[pairs, options]`; NaN where there is no answer."""
        if self._pairs.form == "dist":
            return similarity(p, self._pairs.target)
        known = np.isfinite(p[:, 0])
        return np.where(known, accuracy(np.nan_to_num(p), self._pairs.target, chosen), np.nan)

    def _score(self, answers: Answers) -> Floats:
        return self._metric(answers.p, answers.chosen)

    def _row(self, answers: Answers) -> dict[str, Any]:
        pairs, resampler, names = self._pairs, self._resampler, self._dataset.cultures
        mine = self._scores[answers.row.key]
        whole = resampler.means(mine, pairs.cluster)
        each = resampler.means(mine, pairs.cluster, pairs.culture, len(names))
        guess = resampler.means(np.where(np.isfinite(mine), self._scores["uniform"], np.nan), pairs.cluster)
        parts, items = self._dataset.parts, self._dataset.items
        of = zip(pairs.item.tolist(), pairs.culture.tolist(), strict=True)
        part = np.array([parts.index(items[at].parts[names[culture]]) for at, culture in of], dtype=np.int64)
        of_part = resampler.means(mine, pairs.cluster, part, len(parts))
        of_guess = estimate(
            int(whole.n[0]), float(skill(whole.mean, guess.mean)[0]), skill(whole.draws, guess.draws)[:, 0]
        )
        # Options that a question does not have are no predictions.
        there = np.arange(pairs.target.shape[1])[None, :] < pairs.size[:, None]
        there = there & np.isfinite(answers.p[:, :1])
        bins = reliability(answers.p[there], pairs.target[there])
        return {
            "row": answers.row.key,
            "label": answers.row.label,
            "committee": answers.row.team,
            "pooled": whole.estimate().to_dict(),
            "macro": resampler.macro(each).to_dict(),
            "skill": of_guess.to_dict(),
            "cultures": {name: each.estimate(at).to_dict() for at, name in enumerate(names)},
            "parts": {name: of_part.estimate(at).to_dict() for at, name in enumerate(parts)},
            "ece": finite(expected_calibration_error(bins)),
            "calibration": [vars(one) for one in bins],
            "asked": self._of_asked(answers),
        }

    def _of_asked(self, answers: Answers) -> dict[str, float | None] | None:
        """The figures of the method's paper, for rows that ask a committee."""
        team = next((team for team in self._cast.teams if team.label == answers.row.team), None)
        told = [
            (outcome, self._dataset.cultures[culture])
            for outcome, culture in zip(answers.outcomes, self._pairs.culture.tolist(), strict=True)
            if outcome is not None and outcome.asked
        ]
        if team is None or not told:
            return None
        cultures = {name: expert.culture for name, expert in team.experts.items()}
        relevant = [relevant_share([cultures.get(name) for name in one.asked], culture) for one, culture in told]
        return {
            "relevant_share": finite(float(np.mean(relevant))),
            "diversity_entropy": finite(float(np.mean([one.entropy for one, _ in told]))),
            "completeness": finite(completeness(answers.p)),
            "left_to_base": finite(float(np.mean([one.asked == (BASE,) for one, _ in told]))),
        }

    def _difference(self, a: str, b: str) -> dict[str, Any]:
        """Of two rows, over the pairs that both have an answer to."""
        pairs, gap = self._pairs, self._scores[a] - self._scores[b]
        each = self._resampler.means(gap, pairs.cluster, pairs.culture, len(self._dataset.cultures))
        pooled = self._resampler.means(gap, pairs.cluster).estimate()
        return {"a": a, "b": b, "pooled": pooled.to_dict(), "macro": self._resampler.macro(each).to_dict()}

    def _matrix(self, team: Team) -> dict[str, Any]:
        """Every culture's mean score by every culture's expert."""
        pairs, cultures = self._pairs, self._dataset.cultures
        values = np.full((len(cultures), len(team.of)), np.nan)
        sizes = np.bincount(pairs.culture, minlength=len(cultures))
        for column, culture in enumerate(team.of):
            p = np.zeros_like(pairs.target)
            for at, index in enumerate(pairs.item.tolist()):
                item = self._dataset.items[index]
                p[at, : len(item.options)] = self._option_scores.of(item, team.key(culture))
            sums = np.bincount(pairs.culture, self._metric(p), len(cultures))
            values[:, column] = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)
        return {
            "committee": team.label,
            "cultures": list(cultures),
            "experts": list(team.of),
            "values": [[finite(value) for value in row] for row in values.tolist()],
        }
