"""The shipped committee on the real base: questions that name a country, or one of its places, reach that country's expert."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from whispers_engine import Engine, Routed
from whispers_engine.evaluation.metrics import expected_calibration_error, reliability
from whispers_engine.router import TokenRouter, profile_text
from whispers_engine.router_examples import ANY, read_examples
from whispers_engine.router_fit import fit_router

DATA = Path(__file__).parents[2] / "examples" / "data"
TRAINED = ("router-train.jsonl", "router-places.jsonl", "neutral.jsonl")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("smollm2-135m-instruct", DATA.parent / "cultures", kv_cache_tokens=8192)


@pytest.fixture(scope="module")
def trained() -> str:
    return "\n".join(example.question for name in TRAINED for example in read_examples(DATA / name))


def seen(row: dict[str, Any], trained: str) -> bool:
    return bool(re.search(rf"\b{re.escape(row['place'])}\b", trained))


def test_the_questions_are_not_the_examples(trained: str) -> None:
    asked = rows("routing.jsonl")
    assert not set(trained.split("\n")) & {row["question"] for row in asked}
    assert {names: sum(row["names"] == names for row in asked) for names in ("country", "city", None)} == {
        "country": 60,
        "city": 60,
        None: 30,
    }
    assert all(row["place"] in row["question"] for row in asked if row["names"] == "city")
    assert sum(not seen(row, trained) for row in asked if row["names"] == "city") == 31
    held_out = {row["question"] for row in rows("neutral.jsonl") if row["split"] == "heldout"}
    assert not [question for question in held_out if question in trained]


def test_questions_and_profiles_reach_their_expert_first(engine: Engine, trained: str) -> None:
    """At least 95 of 100, also where the city was in no example; weights that are right as often as they say; a gate that tells."""
    router = engine.router
    assert isinstance(router, TokenRouter)
    asked = rows("routing.jsonl")
    features = engine.read([row["question"] for row in asked], router.reader)
    right: dict[str, list[bool]] = {"country": [], "seen": [], "unseen": []}
    weights = []
    for row, feature in zip(asked, features, strict=True):
        if row["culture"] is not None:
            name, weight = router.route(feature, None, engine.experts, len(engine.experts))[0]
            what = "country" if row["names"] == "country" else "seen" if seen(row, trained) else "unseen"
            right[what].append(engine.expert(name).culture == row["culture"])
            weights.append((weight, right[what][-1]))
    shares = {what: sum(found) / len(found) for what, found in right.items()}
    assert shares["country"] >= 0.98 and shares["seen"] >= 0.93 and shares["unseen"] >= 0.93, shares
    assert sum(map(sum, right.values())) >= 0.95 * 120
    bins = reliability(np.array([one for one, _ in weights]), np.array([float(one) for _, one in weights]))
    assert expected_calibration_error(bins) <= 0.05

    neutral = [row["question"] for row in rows("neutral.jsonl") if row["split"] == "heldout"]
    facts = list(dict.fromkeys(row["question"] for row in rows("facts-heldout.jsonl")))
    low, high = ([router.stake(one) for one in engine.read(texts, router.reader)] for texts in (neutral, facts))
    auroc = (torch.tensor(high)[:, None] > torch.tensor(low)).float().mean()
    assert auroc >= 0.97 and np.mean(np.array(low) <= 0) >= 0.9 and np.mean(np.array(high) > 0) >= 0.9
    at_stake = [
        router.at_stake(feature) == (row["culture"] is not None) for row, feature in zip(asked, features, strict=True)
    ]
    assert np.mean(at_stake) >= 0.96

    plain = engine.read(["What do people usually eat for breakfast?"], router.reader)[0]
    cultures = [engine.expert(name).culture or name for name in engine.experts]
    hints = engine.read([profile_text({"country": culture}) for culture in cultures], router.reader)
    alone = [router.route(plain, hint, engine.experts, 3)[0][0] for hint in hints]
    assert router.at_stake(plain) and alone == engine.experts


def test_questions_that_nothing_was_chosen_by(engine: Engine) -> None:
    """Written when all else was settled: right as often, and as often as the weights say; questions that name nobody favour nobody."""
    assert engine.router is not None
    asked = rows("routing-second.jsonl")
    features = engine.read([row["question"] for row in asked], engine.router.reader)
    best = [engine.router.route(feature, None, engine.experts, len(engine.experts))[0] for feature in features]
    right = np.array(
        [engine.expert(name).culture == row["culture"] for (name, _), row in zip(best, asked, strict=True)]
    )
    assert right.mean() >= 0.95
    assert (
        expected_calibration_error(reliability(np.array([weight for _, weight in best]), right.astype(float))) <= 0.05
    )
    facts = list(dict.fromkeys(row["question"] for row in rows("facts-heldout.jsonl")))
    found = [engine.router.route(one, None, engine.experts, 3) for one in engine.read(facts, engine.router.reader)]
    assert np.mean([chosen[0][1] < 0.34 for chosen in found]) >= 0.9  # all three alike


def test_a_long_text_that_names_a_country_once(engine: Engine) -> None:
    assert engine.router is not None
    text = (
        "My friend comes from {}, and we have known each other since school. Last week we talked for hours about work, about the flat "
        "that needs paint, about two films and a book that neither of us has finished. On Friday six people will come to dinner. I have "
        "one pot, an oven that is too small, and not much time after work. What shall I cook so that everybody is happy?"
    )
    cultures = {engine.expert(name).culture or name: name for name in engine.experts}
    features = engine.read([text.format(culture) for culture in cultures], engine.router.reader)
    first = [engine.router.route(feature, None, engine.experts, 1)[0][0] for feature in features]
    assert first == list(cultures.values())


def test_whole_requests_are_routed_so(engine: Engine) -> None:
    for question, profile, first in (
        ("What do people in Tokyo do when the cherry trees bloom?", None, "japan"),
        ("What do people usually eat for breakfast?", {"country": "Mexico"}, "mexico"),
        ("What is 17 times 23?", None, "base"),
    ):
        event = next(engine.stream(question, ["yes", "no"], profile=profile))
        assert isinstance(event, Routed) and event.routing[0][0] == first
        assert event.gated == (first == "base")


def test_the_shipped_router_is_what_its_examples_give(engine: Engine) -> None:
    """On a few of them only: the layer, the experts, the kind, a gate."""
    some = [e for e in read_examples(DATA / "router-train.jsonl") if e.culture in ("Japan", "Italy", ANY)]
    fitted = fit_router(engine, [*some, *read_examples(DATA / "neutral.jsonl")[:40]])
    assert engine.router is not None and engine.router.gate is not None and fitted.router.gate is not None
    assert (fitted.router.layer, fitted.router.kind) == (engine.router.layer, engine.router.kind)
    assert {name for name, _ in fitted.router.experts} == {"japan", "italy"}
    assert fitted.top1 >= 0.9 and fitted.gate_auroc is not None and fitted.gate_auroc >= 0.9
