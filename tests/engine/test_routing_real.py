"""The shipped committee on the real base: questions that name a country, or one of its cities, reach that country's expert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whispers_engine import Engine, Routed
from whispers_engine.router import profile_text
from whispers_engine.router_fit import fit_router, read_examples

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("smollm2-135m-instruct", EXAMPLES / "cultures", kv_cache_tokens=8192)


def test_the_questions_are_not_the_examples() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "routing.jsonl").read_text("utf-8").splitlines()]
    fitted = {example.question for example in read_examples(EXAMPLES / "data" / "routing-train.jsonl")}
    assert not fitted & {row["question"] for row in rows}
    assert {names: sum(row["names"] == names for row in rows) for names in ("country", "city", None)} == {
        "country": 60,
        "city": 60,
        None: 30,
    }


def test_questions_and_profiles_reach_their_expert(engine: Engine) -> None:
    router = engine.router
    assert router is not None
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "routing.jsonl").read_text("utf-8").splitlines()]
    features = engine.read([row["question"] for row in rows], router.layer)
    reached = {"country": 0, "city": 0}
    for row, feature in zip(rows, features, strict=True):
        assert router.at_stake(feature) == (row["culture"] is not None), row
        if row["culture"] is not None:
            routing = router.route(feature, None, engine.experts, 3)
            reached[row["names"]] += row["culture"] in {engine.expert(name).culture for name, _ in routing}
    assert reached["country"] >= 0.9 * 60 and reached["city"] >= 0.8 * 60, reached
    (plain,) = engine.read(["What do people usually eat for breakfast?"], router.layer)
    cultures = [engine.expert(name).culture or name for name in engine.experts]
    hints = engine.read([profile_text({"country": culture}) for culture in cultures], router.layer)
    alone = sum(
        name in dict(router.route(plain, hint, engine.experts, 3))
        for name, hint in zip(engine.experts, hints, strict=True)
    )
    assert router.at_stake(plain) and alone >= 18


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
    """On a few of them only: the layer, the experts, the kind."""
    examples = [e for e in read_examples(EXAMPLES / "data" / "routing-train.jsonl") if e.culture in ("Japan", "Italy")]
    fitted = fit_router(engine, examples)
    assert engine.router is not None
    assert (fitted.router.layer, fitted.router.kind) == (engine.router.layer, engine.router.kind)
    assert fitted.top1 == 1.0 and [name for name, _ in fitted.router.experts] == ["japan", "italy"]
