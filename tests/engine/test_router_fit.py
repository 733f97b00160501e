"""Fitting a router from questions: what it learns to tell apart, how sure it is then, and what cannot be fitted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import Tiny, soft_prompt
from tests.engine.test_router import make_engine
from whispers_engine import WhispersError
from whispers_engine.router import CentroidRouter, TokenRouter, floored
from whispers_engine.router_examples import ANY, Example, read_examples
from whispers_engine.router_fit import calibrate_floor, fit_features, fit_router

WORDS = {"e0": "rice", "e1": "bread", "e2": "tea"}


def examples() -> list[Example]:
    frames = (
        "what do people eat with {}",
        "{} for breakfast",
        "the people of {} speak",
        "we listen to {} in the morning",
    )
    named = [Example(frame.format(word), name) for name, word in WORDS.items() for frame in frames]
    return [*named, Example("what do people eat", ANY), *(Example(f"{n} {n} {n}", None) for n in range(8))]


@pytest.mark.parametrize("kind", ["token", "linear", "centroid"])
def test_fitting(llama: Tiny, kind: str) -> None:
    engine = make_engine(llama)
    seen: list[tuple[int, int]] = []
    fitted = fit_router(engine, examples(), kind, layer=1, progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] and fitted.examples == 21
    router = fitted.router
    assert [name for name, _ in router.experts] == list(WORDS) and router.gate is not None
    features = engine.read([example.question for example in examples()], router.reader)
    for example, feature in zip(examples(), features, strict=True):
        assert router.at_stake(feature) == (example.culture is not None), example
        if kind != "centroid" and example.culture in WORDS:
            assert router.route(feature, None, list(WORDS), 1)[0][0] == example.culture
    if isinstance(router, CentroidRouter):
        standard = (features[:4] - router.mean) / router.std
        torch.testing.assert_close(router.learned[0], standard.mean(0), atol=1e-3, rtol=1e-3)
    again = fit_router(make_engine(llama), examples(), kind, layer=1).router
    torch.testing.assert_close(again.learned, router.learned, atol=1e-3, rtol=1e-3)
    assert fit_router(engine, examples()[:12], kind).router.gate is None
    assert fit_router(engine, examples()[:12], kind).router.layer == (1 if kind == "token" else 2)


def test_a_floor_leaves_all_alike_that_says_nothing() -> None:
    scores = torch.tensor([[0.3, 0.0, -0.2, 0.1, -0.4], [9.0, 0.0, -0.2, 0.1, -0.4]], dtype=torch.float64)
    flat, sharp = (floored(scores, 2.0, 0.2) / 0.2).softmax(-1)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.2), atol=1e-3, rtol=0)
    assert sharp[0] > 0.999
    # By the definition.
    above = torch.tensor([9.0, 0.0, -0.2, 0.1, -0.4], dtype=torch.float64)
    weights = (above / 0.2).exp() + math.exp(2.0 / 0.2)
    torch.testing.assert_close(sharp, weights / weights.sum())


def test_calibration_finds_where_scores_begin_to_tell() -> None:
    """Made-up scores: whoever is named lies 4 above the rest, and what is no name goes up and down by 1."""
    noise = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of = torch.arange(400) % 6
    named = torch.arange(400) < 200
    right = torch.nn.functional.one_hot(of, 6).double()
    scores = noise + 6 * right * named[:, None]
    target = torch.where(named[:, None], right, 1 / 6)
    temperature, floor = calibrate_floor(scores, target, named, torch.ones(200))
    assert floor is not None and 0.5 <= floor <= 4
    found = (floored(scores, floor, temperature) / temperature).softmax(-1)
    plain = (scores / calibrate_floor(scores[:200], target[:200], named[:200], torch.ones(200))[0]).softmax(-1)
    assert found[~named].amax(1).mean() < 0.5 * plain[~named].amax(1).mean()
    assert found[:200][right[:200] > 0].mean() > 0.9
    assert calibrate_floor(scores[:200], target[:200], named[:200], torch.ones(200))[1] is None


def test_questions_apart_set_the_weights_alone(llama: Tiny) -> None:
    engine = make_engine(llama)
    apart = [Example(f"we bought {word} today", name) for name, word in WORDS.items()]
    plain, wrong = fit_router(engine, examples()).router, [replace(one, culture="e0") for one in apart]
    sure, unsure = (fit_router(engine, examples(), calibration=some).router for some in (apart, wrong))
    for router in (sure, unsure):
        assert isinstance(router, TokenRouter) and router.floor is not None
        assert torch.equal(router.learned, plain.learned)
        assert router.gate is not None and plain.gate is not None and torch.equal(router.gate, plain.gate)
    features = engine.read([one.question for one in apart], sure.reader)
    largest = [
        sum(router.route(feature, None, list(WORDS), 3)[0][1] for feature in features) for router in (sure, unsure)
    ]
    assert largest[0] > largest[1]  # two of three answers were wrong: weights say so


def test_what_cannot_be_fitted_is_refused(llama: Tiny, tmp_path: Path) -> None:
    engine = make_engine(llama)
    for given, kind, layer, message in (
        (examples(), "deep", None, "kind 'deep'; accepted: token, centroid, linear"),
        (examples(), "linear", 9, "layer: 9"),
        ([*examples(), Example("x", "Atlantis")], "linear", None, "'Atlantis'; accepted: e0"),
        (examples()[:4], "linear", None, "4 examples that concern the cultures of 1 experts"),
    ):
        with pytest.raises(WhispersError, match=message):
            fit_router(engine, given, kind, layer)
    for calibration, kind, message in (
        ([Example("the tea", "e2")], "linear", "1 questions that concern an expert, for the kind 'linear'"),
        ([Example("x", None), Example("y", ANY)], "token", "0 questions that concern an expert"),
        ([Example("rice for breakfast", "e0")], "token", "asks 'rice for breakfast', an example"),
        ([Example("x", "Atlantis")], "token", "'Atlantis'; accepted: e0"),
    ):
        with pytest.raises(WhispersError, match=message):
            fit_router(engine, examples(), kind, calibration=calibration)
    path = tmp_path / "examples.jsonl"
    path.write_text('{"question": "a", "culture": null}\n\n{"question": "b", "culture": "e0", "more": 1}\n')
    assert read_examples(path) == [Example("a", None), Example("b", "e0")]
    for line in (
        "{",
        "[]",
        '{"question": "", "culture": null}',
        '{"question": "a"}',
        '{"question": "a", "culture": 3}',
        '{"question": "a", "culture": " "}',
        '{"question": "a", "culture": "e0", "place": ""}',
    ):
        path.write_text(json.dumps({"question": "a", "culture": "e0"}) + "\n" + line)
        with pytest.raises(WhispersError, match=r"examples.jsonl:2: is no example"):
            read_examples(path)
    with pytest.raises(WhispersError) as caught:
        read_examples(tmp_path / "none.jsonl")
    assert str(caught.value).endswith(
        "none.jsonl: cannot be read: No such file or directory; accepted: a file of examples"
    )
    path.write_bytes(b"\xff")
    with pytest.raises(WhispersError, match=r"examples.jsonl: cannot be read: 'utf-8' codec"):
        read_examples(path)


@pytest.mark.parametrize("kind", ["token", "linear", "centroid"])
@pytest.mark.parametrize("culture", ["bakers", "e0"])  # e0: another expert's name, and it speaks for itself
def test_two_experts_of_one_culture_are_refused(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, kind: str, culture: str
) -> None:
    engine = make_engine(llama)
    for seed, name in enumerate(["apart"] if culture == "e0" else ["apart", "again"]):
        engine.add_expert(replace(soft_prompt(llama, 3, 90 + seed, name, "suffix"), culture=culture))
    fit_router(engine, examples()[4:], kind, layer=1)  # no example concerns the culture: both stay unknown
    for read in ("read", "read_tokens"):
        monkeypatch.setattr(engine, read, lambda *_: pytest.fail("read before it was refused"))
    given = [*examples()[4:], Example("bread and tea", culture), Example("we eat bread and tea", culture)]
    both = "'e0' and 'apart'" if culture == "e0" else "'apart' and 'again'"
    with pytest.raises(WhispersError, match=f"{both} both speak for '{culture}'; accepted: one expert a culture"):
        fit_router(engine, given, kind, layer=1)


@pytest.mark.parametrize("kind", ["token", "linear", "centroid"])
def test_examples_that_concern_no_expert_do_not_count(llama: Tiny, kind: str) -> None:
    few = [Example("rice", "e0"), Example("bread", "e1")]
    more = [Example("x", ANY), *(Example(f"{n} {n}", None) for n in range(8))]
    with pytest.raises(
        WhispersError, match="2 examples that concern the cultures of 2 experts; accepted: two an expert"
    ):
        fit_router(make_engine(llama), [*few, *more], kind, layer=1)
    uneven = [*few, Example("rice for breakfast", "e0"), Example("we eat rice", "e0")]
    assert fit_router(make_engine(llama), [*uneven, *more], kind, layer=1).router.learned.isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "centroid"])
def test_a_fold_that_holds_all_leaves_nothing_to_learn_from(llama: Tiny, kind: str) -> None:
    engine = make_engine(llama)
    known = [engine.expert(name) for name in WORDS]
    one_each = [Example(word, name) for name, word in WORDS.items()]
    features = torch.randn(3, llama.hidden, generator=torch.Generator().manual_seed(1))
    fitted = fit_features(known, one_each, features, features, kind, 1)
    assert fitted.router.learned.isfinite().all()
