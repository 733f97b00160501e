"""Intervals: they cover what they should, questions are drawn whole, and rows are drawn together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from whispers_engine.evaluation.bootstrap import Resampler, estimate
from whispers_engine.evaluation.data import Asked, make_dataset
from whispers_engine.evaluation.metrics import wins
from whispers_engine.evaluation.routing import measure
from whispers_engine.records import read_records


def test_means_and_draws_by_brute_force() -> None:
    """Every draw's mean is that of the drawn questions' scores, each as often as it was drawn."""
    generator = np.random.default_rng(1)
    cluster = np.array([0, 0, 1, 2, 2, 2, 3, 4])
    group = np.array([0, 1, 0, 0, 1, 1, 1, 0])
    scores = generator.random(8)
    scores[3] = np.nan  # not measured
    resampler = Resampler(5, 200, seed=7)
    found = resampler.means(scores, cluster, group, 2)
    assert resampler.counts.shape == (200, 5) and (resampler.counts.sum(1) == 5).all()
    for which in range(2):
        mine = [at for at in range(8) if group[at] == which and at != 3]
        assert found.n[which] == len(mine)
        assert found.mean[which] == pytest.approx(np.mean(scores[mine]))
        for counts, drawn in zip(resampler.counts, found.draws[:, which], strict=True):
            values = [scores[at] for at in mine for _ in range(int(counts[cluster[at]]))]
            assert (math.isnan(drawn) and not values) or drawn == pytest.approx(np.mean(values))
    macro = resampler.macro(found)
    assert macro.mean == pytest.approx(found.mean.mean()) and macro.n == 7
    whole = found.draws[np.isfinite(found.draws).all(1)]
    assert 100 <= len(whole) < 200 and macro.low == pytest.approx(np.quantile(whole.mean(1), 0.025))


def test_the_same_seed_the_same_draws() -> None:
    a, b, c = (Resampler(9, 50, seed) for seed in (0, 0, 1))
    assert (a.counts == b.counts).all() and (a.counts != c.counts).any()


def test_intervals_cover() -> None:
    """Scores of a culture that share their question's luck: the interval of 95 % holds the true mean in about 95 % of 300 worlds, one that
    took every pair for a question of its own would hold it far less often."""
    generator = np.random.default_rng(2)
    questions, each = 60, 8
    cluster = np.repeat(np.arange(questions), each)
    held = {"clustered": 0, "naive": 0}
    together, apart = Resampler(questions, 400), Resampler(questions * each, 400)
    for _ in range(300):
        scores = 0.5 + np.repeat(generator.normal(0, 0.2, questions), each) + generator.normal(0, 0.1, questions * each)
        for kind, one in (
            ("clustered", together.means(scores, cluster)),
            ("naive", apart.means(scores, np.arange(questions * each))),
        ):
            interval = one.estimate()
            held[kind] += interval.low <= 0.5 <= interval.high
    assert 0.91 <= held["clustered"] / 300 <= 0.985
    assert held["naive"] / 300 < 0.75


def test_differences_are_paired() -> None:
    """Two rows that differ by little on every question: their own intervals overlap, that of the difference excludes zero; and it is the
    difference of the same draws."""
    generator = np.random.default_rng(3)
    cluster = np.arange(80)
    a = generator.random(80)
    b = a - 0.02 + generator.normal(0, 0.01, 80)
    resampler = Resampler(80)
    first, second = resampler.means(a, cluster), resampler.means(b, cluster)
    gap = resampler.means(a - b, cluster)
    assert gap.draws == pytest.approx(first.draws - second.draws)
    assert second.estimate().high > first.estimate().low
    assert 0 < gap.estimate().low < 0.02 < gap.estimate().high


def test_nothing_measured() -> None:
    resampler = Resampler(3, 100)
    found = resampler.means(np.array([np.nan, 0.5]), np.array([0, 1]), np.array([0, 1]), 3)
    empty = found.estimate(0)
    assert (empty.n, empty.to_dict()["mean"], empty.to_dict()["low"]) == (0, None, None)
    # a culture of one question: resamples without it are left out
    assert found.estimate(1) == estimate(1, 0.5, np.array([0.5]))
    assert resampler.macro(found).mean == 0.5
    assert resampler.macro(resampler.means(np.array([np.nan]), np.array([0]))).n == 0


def test_a_culture_that_is_not_drawn_does_not_move_the_mean_of_cultures() -> None:
    """A hundred answers of about 0.2 and a few others' of about 0.9, each to one question: draws without one of those are means of fewer
    cultures. They say nothing of the mean of all; where most are such, there is no interval."""
    generator = np.random.default_rng(5)
    for single in (1, 3):
        scores = np.concatenate([generator.normal(0.2, 0.02, 100), generator.normal(0.9, 0.02, single)])
        culture = np.concatenate([np.zeros(100, np.int64), np.arange(1, single + 1)])
        resampler = Resampler(100 + single)
        found = resampler.macro(resampler.means(scores, np.arange(100 + single), culture, single + 1)).to_dict()
        if single == 1:  # e^-1 of the draws lack it
            assert found["mean"] - 0.01 < found["low"] < found["mean"] < found["high"] < found["mean"] + 0.01
        else:
            assert found["mean"] > 0.7 and (found["low"], found["high"]) == (None, None)


class FakeRouter:
    """Its gate's score is the number that a text begins with, less ten; it is right about every third."""

    team = SimpleNamespace(of={"Japan": "nippon"})
    router = SimpleNamespace(gate=True)

    def stake(self, text: str) -> float:
        return float(text.split()[0]) - 10

    def weights(self, text: str, culture: str | None) -> list[tuple[str, float]]:
        return [("andes" if int(text.split()[0]) % 3 else "nippon", 0.6)]


def test_a_router_asked_the_same_again_is_no_surer(tmp_path: Path) -> None:
    """Four wordings of every fact, or every line four times: the intervals are those of one each."""

    def figures(wordings: int, lines: int, from_file: bool) -> dict[str, Any]:
        texts = [(fact, f"{fact} in wording {wording}") for fact in range(6, 30) for wording in range(wordings)]
        records = [
            {"question": text, "fact": str(fact), "options": ["a", "b"], "answer": {"Japan": 0}, "names": "city"}
            for fact, text in texts
        ]
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        dataset = make_dataset(read_records(path), ["Japan"])
        # Questions of the file's wordings, and others.
        asked = [Asked(text if from_file else f"{fact} else", "Japan", "country") for fact, text in texts]
        neutral = [Asked(f"{number} neutral", None, None) for number in range(20)]
        return measure(FakeRouter(), dataset, asked * lines + neutral, 300, 0, profile=False)  # type: ignore[arg-type]

    def interval(one: dict[str, Any]) -> tuple[float, float]:
        return one["low"], one["high"]

    once = figures(1, 1, False)
    assert once["gate"]["file"]["auroc"]["low"] < once["gate"]["file"]["auroc"]["high"] < 1
    for again in (figures(4, 1, True), figures(1, 4, False), figures(4, 4, True)):
        for side in ("file", "questions"):
            assert interval(again["gate"][side]["auroc"]) == interval(once["gate"][side]["auroc"])
        for what in ("city", "country"):
            assert interval(again["named"][what]["top1"]) == interval(once["named"][what]["top1"])
    assert figures(4, 1, True)["gate"]["questions"]["n"] == 96 and figures(1, 4, False)["gate"]["questions"]["n"] == 24


def test_auroc_by_brute_force() -> None:
    generator = np.random.default_rng(4)
    high, low = generator.normal(1, 1, 12), generator.normal(0, 1, 9)
    resampler = Resampler(21, 300)
    index = np.arange(21)
    found = resampler.auroc(wins(high, low), index[:12], index[12:])
    draws = []
    for counts in resampler.counts:
        a, b = np.repeat(high, counts[:12].astype(int)), np.repeat(low, counts[12:].astype(int))
        draws.append(np.mean([(x > y) + (x == y) / 2 for x in a for y in b]))
    assert found.mean == pytest.approx(np.mean([x > y for x in high for y in low]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
