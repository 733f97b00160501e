"""`mixture` and `product` equal a direct computation from each expert's own log-probabilities: transformers and PEFT for every step of a
generated answer, `score` for options.

The generated tokens go through the oracle as one option. Where every step's pooled likeliest token is the one that was generated, the
answer is, step by step, what generating with the oracle alone would give.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.engine.conftest import Tiny, kv_prompt, soft_prompt, token_ids
from tests.engine.oracle import oracle_logprobs
from whispers_engine import Answer, Done, Engine, Expert, Request, SamplingParams, Token
from whispers_engine.sampling import sample

TOLERANCE = 1e-4
STEPS = 7
RULES = ["mixture", "product"]


def make_experts(tiny: Tiny) -> list[Expert]:
    return [
        soft_prompt(tiny, 5, 1, "suffix", "suffix"),
        soft_prompt(tiny, 9, 2, "prefix", "prefix"),
        soft_prompt(tiny, 4, 3, "detached", "detached"),
        kv_prompt(tiny, 6, 4, "kv-prefix", "prefix"),
        kv_prompt(tiny, 3, 5, "kv-detached", "detached"),
    ]


def make_engine(tiny: Tiny, experts: Sequence[Expert]) -> Engine:
    engine = Engine(tiny.folder, page_size=8, kv_cache_tokens=4096)
    for expert in experts:
        engine.add_expert(expert)
    return engine


@pytest.fixture(scope="module")
def shared(llama: Tiny) -> Engine:
    """For tests that add nothing to it."""
    return make_engine(llama, make_experts(llama))


def question(tiny: Tiny, seed: int = 4) -> tuple[list[int], list[int]]:
    return token_ids(tiny, 18 + seed, seed=seed), token_ids(tiny, 3, seed=seed + 1)


def pool(logprobs: Tensor, weights: Sequence[float], rule: str) -> Tensor:
    """The rules as docs/semantics.md has them, in float64, over the experts `[E, ..., V]` that are asked at all."""
    share = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    asked = share > 0
    logp, share = logprobs[asked].double(), share[asked].view(-1, *[1] * (logprobs.dim() - 1))
    if rule == "mixture":
        return (share * logp.exp()).sum(0).log()
    return (share * logp).sum(0).log_softmax(-1)


@dataclass(frozen=True)
class Run:
    """An answer and the events that it came with."""

    answer: Answer
    events: list[Token]

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events]


def run(
    engine: Engine,
    asked: tuple[list[int], list[int]],
    experts: Sequence[str] | Mapping[str, float],
    rule: str,
    **how: float,
) -> Run:
    sampling = SamplingParams(**{"max_tokens": STEPS, **how})  # type: ignore[arg-type]
    events = list(engine.stream(asked, experts=experts, aggregate=rule, sampling=sampling))
    assert isinstance(events[-1], Done)
    return Run(events[-1].answer, [event for event in events if isinstance(event, Token)])


def check(tiny: Tiny, engine: Engine, asked: tuple[list[int], list[int]], weights: dict[str, float], rule: str) -> Run:
    """Generates with the engine, computes all of it with the oracle, compares."""
    got = run(engine, asked, weights, rule)
    own = torch.stack(
        [oracle_logprobs(tiny.hf, engine.expert(name), *asked, got.tokens) for name in weights]
    )  # [E, steps, V]
    pooled = pool(own, list(weights.values()), rule)
    assert got.tokens == pooled.argmax(-1).tolist()
    assert [event.expert for event in got.events] == [None] * len(got.tokens)
    torch.testing.assert_close(
        torch.tensor([event.logprob for event in got.events], dtype=torch.float64),
        pooled.amax(-1),
        atol=TOLERANCE,
        rtol=0,
    )
    of_tokens = own.gather(-1, torch.tensor(got.tokens).expand(len(weights), -1)[..., None])[..., 0]  # [E, steps]
    total = math.fsum(weights.values())
    for (name, weight), record, mine in zip(weights.items(), got.answer.experts, of_tokens, strict=True):
        assert (record.expert, record.tokens, record.text) == (name, got.tokens, got.answer.text)
        assert record.weight == pytest.approx(weight / total)
        assert record.logprob == pytest.approx(mine.sum().item(), abs=TOLERANCE * len(mine))
    assert got.answer.text == tiny.tokenizer.decode(got.tokens, skip_special_tokens=True)
    assert got.answer.text == "".join(event.text for event in got.events)
    assert (list(got.answer.votes), got.answer.agreement, got.answer.options) == (
        [got.answer.text],
        pytest.approx(1),
        None,
    )
    return got


COMMITTEES = [
    {"suffix": 1.0, "prefix": 1.0, "detached": 1.0, "kv-prefix": 1.0, "kv-detached": 1.0},
    {"kv-detached": 5.0, "suffix": 0.5, "kv-prefix": 2.0, "detached": 1.5, "prefix": 3.0},
    {"prefix": 0.9, "detached": 0.1},
    {"suffix": 0.6, "kv-prefix": 0.4},
    {"suffix": 0.0, "kv-detached": 2.0, "prefix": 0.0, "detached": 1.0},
    {"kv-prefix": 1e-30, "suffix": 1.0},
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "weights", COMMITTEES, ids=lambda weights: "-".join(f"{weight:g}" for weight in weights.values())
)
def test_a_pool_is_the_direct_computation(llama: Tiny, shared: Engine, weights: dict[str, float], rule: str) -> None:
    """Placements and kinds mixed, equal and unequal weights, some of them 0."""
    check(llama, shared, question(llama), weights, rule)


@pytest.mark.parametrize("rule", RULES)
def test_every_family_pools(tiny: Tiny, rule: str) -> None:
    engine = make_engine(tiny, make_experts(tiny))
    check(
        tiny,
        engine,
        question(tiny, seed=6),
        {"suffix": 2, "prefix": 1, "detached": 3, "kv-prefix": 1, "kv-detached": 2},
        rule,
    )


def test_the_two_rules_and_the_experts_differ(llama: Tiny, shared: Engine) -> None:
    """Otherwise the tests above could not tell a pool from one of its members, or one rule from the other."""

    def first_logprob(experts: Sequence[str] | Mapping[str, float], rule: str) -> float:
        return run(shared, question(llama), experts, rule, max_tokens=1).events[0].logprob

    found = [first_logprob(weights, rule) for weights in COMMITTEES[:2] for rule in RULES]
    found += [first_logprob([name], "mixture") for name in COMMITTEES[0]]
    found.sort()
    assert min(b - a for a, b in itertools.pairwise(found)) > 10 * TOLERANCE


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["suffix", "prefix", "detached", "kv-prefix", "kv-detached"])
def test_a_pool_of_one_is_that_expert(llama: Tiny, shared: Engine, name: str, rule: str) -> None:
    """And so is one in which the others have no weight."""
    alone = check(llama, shared, question(llama), {name: 1.0}, rule)
    voted = shared.ask(question(llama), experts=[name], sampling=SamplingParams(max_tokens=STEPS)).experts[0]
    assert (voted.tokens, voted.text) == (alone.tokens, alone.answer.text)
    assert voted.logprob == pytest.approx(sum(event.logprob for event in alone.events), abs=1e-5 * STEPS)
    idle = {other: float(other == name) for other in COMMITTEES[0]}
    assert check(llama, shared, question(llama), idle, rule).tokens == alone.tokens


@pytest.mark.parametrize("rule", RULES)
def test_equal_experts_pool_to_one_of_them(llama: Tiny, rule: str) -> None:
    engine = make_engine(llama, [soft_prompt(llama, 5, 1, name, "suffix") for name in ("one", "two", "three")])
    one = check(llama, engine, question(llama), {"one": 1.0}, rule)
    all_three = check(llama, engine, question(llama), {"one": 0.2, "two": 0.5, "three": 0.3}, rule)
    assert all_three.tokens == one.tokens
    assert [event.logprob for event in all_three.events] == pytest.approx(
        [event.logprob for event in one.events], abs=1e-5
    )


@pytest.mark.parametrize("rule", RULES)
def test_the_base_alone_pools(llama: Tiny, shared: Engine, rule: str) -> None:
    got = run(shared, question(llama), [], rule)
    own = oracle_logprobs(llama.hf, None, *question(llama), got.tokens)
    assert got.tokens == own.argmax(-1).tolist()
    assert [event.logprob for event in got.events] == pytest.approx(own.amax(-1).tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("rule", RULES)
def test_sampling_is_from_the_pool(llama: Tiny, shared: Engine, rule: str) -> None:
    """One draw for all, from the pooled distribution; what is reported is the pool's log-probability before temperature and filters."""
    hot = {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "seed": 77}
    weights = COMMITTEES[1]
    got = run(shared, question(llama), weights, rule, **hot)
    own = torch.stack(
        [oracle_logprobs(llama.hf, shared.expert(name), *question(llama), got.tokens) for name in weights]
    )
    pooled = pool(own, list(weights.values()), rule).float()
    params = [SamplingParams(**hot)] * STEPS  # type: ignore[arg-type]
    assert got.tokens == sample(pooled, params, [77] * STEPS, [0] * STEPS, range(STEPS)).tolist()
    assert got.tokens != pooled.argmax(-1).tolist()
    want = pooled.gather(-1, torch.tensor(got.tokens)[:, None])[:, 0].tolist()
    assert [event.logprob for event in got.events] == pytest.approx(want, abs=TOLERANCE)


# --- options -------------------------------------------------------------------------------------------------------------------

OPTIONS: list[str | list[int]] = ["rice", "bread and tea", [17], "the people of many shores", [40, 41, 42]]


@pytest.mark.parametrize(
    "weights", COMMITTEES, ids=lambda weights: "-".join(f"{weight:g}" for weight in weights.values())
)
def test_options_are_pooled_by_the_rules(llama: Tiny, shared: Engine, weights: dict[str, float]) -> None:
    """From `score`'s log-probabilities, made a distribution over the options first. A vote reports the linear pool, but counts votes."""
    names = list(weights)
    scored = shared.score(question(llama), OPTIONS, experts=names)
    over_options = scored.logprobs.double().log_softmax(-1)
    texts = [option if isinstance(option, str) else llama.tokenizer.decode(option) for option in OPTIONS]
    choices = scored.logprobs.argmax(-1).tolist()
    total = math.fsum(weights.values())
    found = []
    for rule, direct in (("vote", "mixture"), ("mixture", "mixture"), ("product", "product")):
        got = shared.ask(question(llama), OPTIONS, experts=weights, aggregate=rule)
        want = pool(over_options, list(weights.values()), direct).exp()
        assert got.options == pytest.approx(want.tolist(), abs=TOLERANCE)
        assert math.fsum(got.options or []) == pytest.approx(1)
        assert [record.text for record in got.experts] == [texts[choice] for choice in choices]
        assert [record.logprob for record in got.experts] == pytest.approx(
            scored.logprobs.amax(-1).tolist(), abs=5 * TOLERANCE
        )
        if rule != "vote":
            assert got.text == texts[int(want.argmax())]
            behind = math.fsum(
                weights[name] for name, choice in zip(names, choices, strict=True) if texts[choice] == got.text
            )
            assert got.agreement == pytest.approx(behind / total)
        found.append(got.options)
    assert found[0] == found[1] != found[2]


def test_a_pool_may_choose_what_nobody_chose(llama: Tiny, shared: Engine) -> None:
    """Everybody's second choice, and no first one: the agreement is 0, the votes are for the others."""
    names = ["suffix", "detached"]
    ids = [token for token in range(llama.vocab) if re.fullmatch(" ?[a-z]+", llama.tokenizer.decode([token]))]
    found = shared.score(question(llama), [[token] for token in ids], experts=names).logprobs
    # Two tokens that only one of them likes, one that both like nearly as well: the first two give way to it in a logarithmic pool.
    first, second = int((found[0] - found[1]).argmax()), int((found[1] - found[0]).argmax())
    bound = torch.stack((found[0, first] - found[0], found[1, second] - found[1]))
    common = int(torch.where((bound > 0.05).all(0), bound.sum(0), torch.inf).argmin())
    picked = [first, second, common]
    options, logprobs = [[ids[index]] for index in picked], found[:, picked]
    assert logprobs.argmax(-1).tolist() == [0, 1]
    got = shared.ask(question(llama), options, experts=names, aggregate="product")
    assert got.text == llama.tokenizer.decode(options[2])
    assert (got.agreement, got.diversity_entropy) == (0.0, 1.0)
    assert set(got.votes.values()) == {0.5} and got.text not in got.votes


@pytest.mark.parametrize(
    ("experts", "weights"),
    [
        (["prefix", "suffix", "kv-detached"], [1 / 3] * 3),
        ({"prefix": 1.0, "suffix": 2.0, "kv-detached": 5.0}, [1 / 8, 2 / 8, 5 / 8]),
        ({"kv-prefix": 0.0, "detached": 3.0}, [0.0, 1.0]),
        (["detached"], [1.0]),
        (None, [1 / 5] * 5),
        ([], [1.0]),
    ],
    ids=str,
)
def test_score_pools_linearly(
    llama: Tiny, shared: Engine, experts: list[str] | dict[str, float] | None, weights: list[float]
) -> None:
    got = shared.score(question(llama), OPTIONS, experts=experts)
    assert got.experts == (shared.experts if experts is None else list(experts) or ["base"])
    assert (got.logprobs.dtype, got.weights.dtype, got.pooled.dtype) == (torch.float32,) * 3
    assert got.logprobs.shape == (len(weights), len(OPTIONS))
    assert got.weights.tolist() == pytest.approx(weights)
    want = torch.tensor(weights, dtype=torch.float64) @ got.logprobs.double().softmax(-1)
    torch.testing.assert_close(got.pooled.double(), want, atol=1e-6, rtol=0)
    encoded = [option if isinstance(option, list) else llama.tokenizer.encode(option) for option in OPTIONS]
    for name, row in zip(got.experts, got.logprobs, strict=True):
        expert = None if name == "base" else shared.expert(name)
        for ids, value in zip(encoded, row.tolist(), strict=True):
            own = oracle_logprobs(llama.hf, expert, *question(llama), ids)
            assert value == pytest.approx(
                sum(own[at, token].item() for at, token in enumerate(ids)), abs=len(ids) * TOLERANCE
            )


# --- beside others ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_pool_beside_it_changes_no_bit(llama: Tiny, shared: Engine, rule: str) -> None:
    """Of what a branch on its own, or a pool of one, reports: whether the same step has larger pools or not."""
    hot = SamplingParams(max_tokens=STEPS, temperature=1.0, seed=5)
    for aggregate in ("vote", rule):
        alone = shared.ask(question(llama), experts=["suffix"], aggregate=aggregate, sampling=hot).experts
        shared.submit(Request(question(llama, 6), aggregate=rule, sampling=replace(hot, max_tokens=4 * STEPS)))
        beside = shared.ask(question(llama), experts=["suffix"], aggregate=aggregate, sampling=hot).experts
        while shared.busy:
            shared.step()
        if shared.model.impl == "cpp":  # whose rows' bits are their own; a matrix library's are not
            assert beside == alone
        assert beside[0].logprob == pytest.approx(alone[0].logprob, abs=TOLERANCE)
