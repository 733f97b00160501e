"""The figures of an evaluation, against numbers worked by hand and against their definitions written out."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest

from whispers_engine.evaluation.curves import curves_of
from whispers_engine.evaluation.metrics import (
    accuracy,
    auroc,
    completeness,
    entropy_bits,
    expected_calibration_error,
    relevant_share,
    reliability,
    similarity,
    skill,
)


def shares(generator: random.Random, options: int) -> list[float]:
    """A distribution, some of its shares 0."""
    values = [generator.random() * (generator.random() > 0.3) for _ in range(options)]
    return [value / sum(values) for value in values] if sum(values) > 0 else shares(generator, options)


def test_similarity_by_hand() -> None:
    # p = (1, 0), q = (1/2, 1/2), middle (3/4, 1/4): divergence (log2(4/3) + (log2(2/3) + log2(2)) / 2) / 2 = 0.311278
    assert similarity(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(1 - math.sqrt(0.3112781245))
    assert similarity(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 0
    assert similarity(np.array([0.2, 0.8]), np.array([0.2, 0.8])) == 1


def test_similarity_by_its_definition() -> None:
    """Through entropies, in plain Python: H of the middle less the mean of the Hs."""

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log2(x) for x in p if x > 0)

    generator = random.Random(3)
    for _ in range(200):
        p, q = (shares(generator, 5) for _ in range(2))
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        want = 1 - math.sqrt(max(0.0, entropy(middle) - (entropy(p) + entropy(q)) / 2))
        assert float(similarity(np.array(p), np.array(q))) == pytest.approx(want, abs=1e-7)
        assert similarity(np.array(p), np.array(q)) == similarity(np.array(q), np.array(p))
        # options that are not there change nothing
        padded = similarity(np.array([*p, 0.0, 0.0]), np.array([*q, 0.0, 0.0]))
        assert float(padded) == pytest.approx(want, abs=1e-7)


def test_similarity_of_many() -> None:
    p, q = np.array([[1.0, 0.0], [0.5, 0.5], [np.nan, np.nan]]), np.array([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    assert similarity(p, q)[:2].tolist() == [0.0, 1.0] and np.isnan(similarity(p, q)[2])


def test_accuracy_and_ties() -> None:
    p = np.array([[0.5, 0.2, 0.3], [0.4, 0.4, 0.2], [1 / 3, 1 / 3, 1 / 3], [0.4, 0.4, 0.2]])
    answer = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    assert accuracy(p, answer) == pytest.approx([1, 1 / 2, 1 / 3, 0])
    assert accuracy(p, answer, np.array([1, 1, -1, 2])) == pytest.approx([0, 1, 1 / 3, 1])


def test_skill() -> None:
    assert skill(np.array([0.75, 0.5, 0.25]), np.array([0.5, 0.5, 0.5])).tolist() == [0.5, 0.0, -0.5]


def test_there_is_no_skill_where_guessing_is_perfect() -> None:
    """Of questions with one option: no number, and nothing on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = skill(np.array([1.0, 0.5, 0.75, np.nan]), np.array([1.0, 1.0, 0.5, np.nan]))
    assert found[2] == 0.5 and np.isnan(found[[0, 1, 3]]).all()


def test_calibration_by_hand() -> None:
    confidence = np.array([0.05, 0.95, 0.95, 0.95, 1.0, 0.0])
    came_true = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    bins = reliability(confidence, came_true)
    assert [(one.n, one.confidence, one.share) for one in bins] == [
        (2, pytest.approx(0.025), 0.5),
        (4, pytest.approx(0.9625), 0.75),
    ]
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.475 + 4 * 0.2125) / 6)
    assert math.isnan(expected_calibration_error([]))
    # shares as outcomes: perfect where they are what is predicted
    assert expected_calibration_error(reliability(confidence, confidence)) == pytest.approx(0)


def test_auroc_by_pairs() -> None:
    generator = random.Random(5)
    high = [generator.choice([1.0, 2.0, 3.0, 4.0]) for _ in range(23)]
    low = [generator.choice([0.0, 1.0, 2.0, 3.0]) for _ in range(17)]
    want = sum((a > b) + (a == b) / 2 for a in high for b in low) / (23 * 17)
    assert auroc(np.array(high), np.array(low)) == pytest.approx(want)
    assert auroc(np.array([2.0, 3.0]), np.array([1.0])) == 1
    assert auroc(np.array([1.0]), np.array([1.0])) == 0.5
    assert math.isnan(auroc(np.array([]), np.array([1.0])))


def test_the_papers_figures() -> None:
    assert entropy_bits(np.array([2.0, 2.0])) == 1
    assert entropy_bits(np.array([1.0, 0.0])) == 0
    assert entropy_bits(np.array([0.5, 0.25, 0.25])) == 1.5
    assert relevant_share(["Japan", "Italy", None], "Japan") == pytest.approx(1 / 3)
    assert relevant_share([], "Japan") == 0
    assert completeness(np.array([[0.5, 0.5], [np.nan, np.nan]])) == 0.5


def test_curves() -> None:
    assert curves_of({}) == {} and curves_of({"curve": 3, "text": "x"}) == {}
    points = [{"step": 0, "train": 2.0, "dev": None}, {"step": 5, "train": 1.5, "dev": 1.75, "note": "x"}, "no point"]
    record = {"curve": points, "shared_curve": [{"step": 1, "train": 3}], "recurve": points}
    assert curves_of(record) == {"train": [[0.0, 2.0], [5.0, 1.5]], "dev": [[5.0, 1.75]], "shared train": [[1.0, 3.0]]}
