"""Sampling: the noise is Philox, the filters keep exactly the right tokens and leave their odds as they were, a seed gives one answer
whatever runs beside it, and an answer ends where it should."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.engine.conftest import Tiny, kv_prompt, soft_prompt, token_ids
from whispers_engine import Done, Engine, ExpertAnswer, Request, SamplingParams, Token
from whispers_engine.sampling import philox, sample

WORD = 2**32 - 1


# --- noise ---------------------------------------------------------------------------------------------------------------------

# philox4x32-10 in Random123's kat_vectors: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_philox_known_answers() -> None:
    counters, keys, outputs = (torch.tensor([words(line[part]) for line in KNOWN_ANSWERS]) for part in range(3))
    assert philox(counters, keys).tolist() == outputs.tolist()
    assert torch.equal(philox(counters[:, None], keys), torch.stack([philox(c.expand(3, 4), keys) for c in counters]))


def philox_in_integers(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """The same from the paper, in Python's integers, which never wrap."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & WORD, first >> 32 ^ c3 ^ k1, first & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return [c0, c1, c2, c3]


seeds = st.one_of(
    st.sampled_from((0, 1, WORD, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1)), st.integers(0, 2**64 - 1)
)
word = st.one_of(st.sampled_from((0, 1, 2**31, WORD)), st.integers(0, WORD))


@settings(max_examples=200, deadline=None)
@given(seeds, word, word, st.integers(1, 30))
def test_noise_is_made_of_seed_branch_and_position(seed: int, branch: int, position: int, vocab: int) -> None:
    """All 64 bits of the seed count, and the noise is Gumbel's: from uniform words, the token whose -log(-log u) is largest."""
    blocks = [
        philox_in_integers((block, position, branch, 0), (seed & WORD, seed >> 32)) for block in range(-(-vocab // 4))
    ]
    noise = [-math.log(-math.log((value + 0.5) / 2**32)) for block in blocks for value in block][:vocab]
    got = sample(torch.zeros(1, vocab).log_softmax(-1), [SamplingParams(temperature=1.0)], [seed], [branch], [position])
    assert got.tolist() == [noise.index(max(noise))]


# --- which tokens stay, and how likely they are ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A small distribution, in whole parts, and how it is sampled."""

    parts: list[int]
    temperature: float
    top_k: int
    top_p: float

    def params(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def logp(self) -> torch.Tensor:
        return torch.tensor(self.parts).log().log_softmax(-1)

    def expected(self) -> dict[int, float]:
        """The tokens that stay and their probabilities: temperature, then top-k, then top-p, one after the other."""
        heat = [part ** (1 / self.temperature) for part in self.parts]
        likeliest = sorted(range(len(heat)), key=lambda token: (-self.parts[token], token))
        stay = likeliest[: self.top_k or len(heat)]
        total, reached, chosen = sum(heat[token] for token in stay), 0.0, []
        for token in stay:
            if self.top_p == 1 or reached < self.top_p:
                chosen.append(token)
            reached += heat[token] / total
            assume(self.top_p == 1 or abs(reached - self.top_p) > 1e-6)  # where rounding decides, anyone may be right
        kept = sum(heat[token] for token in chosen)
        return {token: heat[token] / kept for token in chosen}


cases = st.builds(
    Case,
    st.lists(st.integers(1, 6), min_size=1, max_size=7),
    st.sampled_from((0.7, 1.0, 1.5)),
    st.integers(0, 9),
    st.sampled_from((0.05, 0.31, 0.5, 0.77, 0.93, 0.999, 1.0)),
)


def chi_square(found: Counter[int], expected: dict[int, float]) -> tuple[float, float]:
    """The statistic, and what one in a thousand million exceeds (Wilson and Hilferty's approximation, six standard deviations)."""
    total, free = sum(found.values()), len(expected) - 1
    statistic = sum((found[token] - total * p) ** 2 / (total * p) for token, p in expected.items())
    return statistic, free * (1 - 2 / (9 * free) + 6 * (2 / (9 * free)) ** 0.5) ** 3 if free else 0.0


@settings(max_examples=100, deadline=None)
@given(cases, seeds, st.sampled_from(("seeds", "branches", "positions")))
def test_support_and_frequencies(case: Case, first: int, axis: str) -> None:
    """Over 4000 positions, branches or seeds: no token but those that stay, all of those, as often as they are likely."""
    expected = case.expected()
    draws = 4000
    from_one = {"seeds": [first] * draws, "branches": [7] * draws, "positions": [3] * draws}
    from_one[axis] = [(from_one[axis][0] + step) % 2**64 for step in range(draws)]
    tokens = sample(case.logp().expand(draws, -1), [case.params()] * draws, **from_one)
    found = Counter(tokens.tolist())
    assert set(found) == set(expected)  # the rarest comes sixty times on average
    statistic, bound = chi_square(found, expected)
    assert statistic <= bound, (found, expected)


@pytest.mark.parametrize(
    ("parts", "top_k", "top_p", "stay"),
    [
        ([2, 5, 5, 5, 2], 2, 1.0, {1, 2}),  # equally likely: the lowest ids stay
        ([1, 1, 1, 1], 0, 0.5, {0, 1}),  # reached exactly
        ([1, 1, 1, 1], 0, 0.51, {0, 1, 2}),
        ([1, 1, 1, 1], 2, 0.5, {0}),  # top_p counts what top_k left
        ([1, 1, 1, 1], 3, 0.99, {0, 1, 2}),
        ([3, 9, 1], 0, 1e-9, {1}),  # one always stays
        ([3, 9, 1], 1, 1.0, {1}),
        ([3, 9, 1], 3, 1.0, {0, 1, 2}),
        ([3, 9, 1], 99, 1.0, {0, 1, 2}),
        ([3, 9, 1], 2**64, 1.0, {0, 1, 2}),  # as many as there are, however it is put
    ],
)
def test_who_stays(parts: list[int], top_k: int, top_p: float, stay: set[int]) -> None:
    draws = 500
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)
    logp = Case(parts, 1.0, 0, 1.0).logp().expand(draws, -1)
    assert set(sample(logp, [params] * draws, [1] * draws, [0] * draws, range(draws)).tolist()) == stay


def test_top_p_comes_after_temperature() -> None:
    """Of 1/10, 3/10, 6/10, half of it all needs one token; at temperature 4, which makes them nearly alike, two."""
    logp = torch.tensor([1.0, 3.0, 6.0]).log().log_softmax(-1).expand(300, -1)
    for temperature, stay in ((1.0, {2}), (4.0, {1, 2})):
        params = SamplingParams(temperature=temperature, top_p=0.5)
        assert set(sample(logp, [params] * 300, [0] * 300, [0] * 300, range(300)).tolist()) == stay


def test_branches_and_positions_are_independent() -> None:
    """Pairs of tokens, of two branches at one position and of one branch at two, come as often as the product of their odds."""
    draws, vocab = 6000, 3
    params = [SamplingParams(temperature=1.0)] * draws
    logp = torch.zeros(draws, vocab).log_softmax(-1)
    here = sample(logp, params, [5] * draws, [1] * draws, range(draws)).tolist()
    beside = sample(logp, params, [5] * draws, [2] * draws, range(draws)).tolist()
    uniform = dict.fromkeys(range(vocab**2), 1 / vocab**2)
    for pairs in (zip(here, beside, strict=True), itertools.pairwise(here)):
        statistic, bound = chi_square(Counter(a * vocab + b for a, b in pairs), uniform)
        assert statistic <= bound


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id() -> None:
    logp = torch.tensor([[1.0, 3.0, 2.0], [2.0, 5.0, 5.0], [4.0, 4.0, 4.0], [1.0, 0.0, 1.0]]).log_softmax(-1)
    for params in (SamplingParams(), SamplingParams(top_k=2, top_p=0.1, seed=9)):
        assert sample(logp, [params] * 4, [1, 2, 3, 4], [0] * 4, range(4)).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-30, 1e-300, 1e-308, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    """Log-probabilities divided by them may leave the range of floats; the choice must not."""
    logp = torch.tensor([[1.0, 3.0, 9.0, 2.0]]).log_softmax(-1)
    for top_k, top_p in ((0, 1.0), (3, 0.9)):
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        assert sample(logp, [params], [1], [2], [3]).tolist() == [2]


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, list[SamplingParams], list[int], list[int], list[int]]:
    number, vocab = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logp = (2 * torch.randn(number, vocab, generator=generator)).log_softmax(-1)
    params = [
        SamplingParams(
            draw(st.sampled_from((0.0, 0.5, 1.0))), draw(st.sampled_from((0.3, 0.9, 1.0))), draw(st.integers(0, 4))
        )
        for _ in range(number)
    ]
    return logp, params, *([draw(numbers) for _ in range(number)] for numbers in (seeds, word, word))


@settings(max_examples=200, deadline=None)
@given(rows())
def test_a_row_depends_on_its_own_arguments(
    case: tuple[torch.Tensor, list[SamplingParams], list[int], list[int], list[int]],
) -> None:
    """Greedy and sampled rows mixed; nor does a call change what it is given."""
    logp, params, *noise = case
    before = logp.clone()
    together = sample(logp, params, *noise).tolist()
    assert torch.equal(logp, before)
    for row in range(len(params)):
        assert sample(logp[row : row + 1], [params[row]], *([values[row]] for values in noise)).tolist() == [
            together[row]
        ]


def test_defaults_are_the_designs() -> None:
    defaults = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": None, "stop": (), "max_tokens": 256}
    assert {name: p.default for name, p in inspect.signature(SamplingParams).parameters.items()} == defaults
    assert dataclasses.asdict(SamplingParams()) == defaults
    assert list(dataclasses.asdict(SamplingParams())) == list(defaults)
    assert SamplingParams(stop="\n") == SamplingParams(stop=["\n"]) == SamplingParams(stop=("\n",))


# --- one seed, one answer --------------------------------------------------------------------------------------------------------

NAMES = ["suffix", "prefix", "detached", "kv"]
HOT = SamplingParams(temperature=1.0, top_p=0.95, top_k=100, seed=2**63 + 12345, max_tokens=10)


def make_engine(tiny: Tiny, **how: int) -> Engine:
    engine = Engine(tiny.folder, page_size=8, kv_cache_tokens=8192, **how)
    for number, name in enumerate(NAMES[:3]):
        engine.add_expert(soft_prompt(tiny, 3 + 2 * number, number, name, name))
    engine.add_expert(kv_prompt(tiny, 4, 9, "kv", "detached"))
    return engine


@pytest.fixture(scope="module")
def shared(llama: Tiny) -> Engine:
    """For tests that add nothing to it."""
    return make_engine(llama)


def question(tiny: Tiny) -> tuple[list[int], list[int]]:
    return token_ids(tiny, 21, seed=4), token_ids(tiny, 3, seed=5)


def tokens_by_name(records: Sequence[ExpertAnswer]) -> dict[str, list[int]]:
    return {record.expert: record.tokens for record in records}


def run_all(engine: Engine, requests: Sequence[Request], every: int = 0) -> list[dict[str, list[int]]]:
    """Submits the requests, one every so many steps, and steps until all are done."""
    ids: list[int] = []
    done: dict[int, dict[str, list[int]]] = {}
    waiting = list(requests)
    while waiting or engine.busy:
        while waiting:
            ids.append(engine.submit(waiting.pop(0)))
            if every:
                break
        for _ in range(every or 1):
            done |= {
                event.request_id: tokens_by_name(event.answer.experts)
                for event in engine.step()
                if isinstance(event, Done)
            }
    return [done[request_id] for request_id in ids]


def test_an_experts_sample_is_its_own(llama: Tiny, shared: Engine) -> None:
    """The same alone, with the others in any order and with any weights, and as often as it is asked."""
    asked = question(llama)
    alone = {name: shared.ask(asked, experts=[name], sampling=HOT).experts[0].tokens for name in NAMES}
    assert len({tuple(tokens) for tokens in alone.values()}) == len(NAMES)
    for experts in (NAMES, NAMES[::-1], NAMES[1:3], dict(zip(NAMES, (3.0, 0.5, 0.0, 1.0), strict=True))):
        got = tokens_by_name(shared.ask(asked, experts=experts, sampling=HOT).experts)
        assert got == {name: alone[name] for name in experts}


@pytest.mark.parametrize("aggregate", ["vote", "mixture", "product"])
def test_company_and_chunks_change_no_sample(llama: Tiny, shared: Engine, aggregate: str) -> None:
    """Beside other requests, begun with it or while it runs, and with the context in chunks of any size."""
    asked = question(llama)
    mine = Request(asked, experts=NAMES, aggregate=aggregate, sampling=HOT)
    others = [
        Request(token_ids(llama, 5, seed=1), experts=[], sampling=dataclasses.replace(HOT, seed=1)),
        Request(asked, experts=NAMES[:2], aggregate="mixture", sampling=dataclasses.replace(HOT, max_tokens=4)),
        Request(asked, experts=NAMES, aggregate="product", sampling=SamplingParams(max_tokens=6)),
        Request(
            token_ids(llama, 40, seed=2), experts=["kv", "prefix"], sampling=dataclasses.replace(HOT, temperature=0.3)
        ),
    ]
    want = tokens_by_name(shared.ask(asked, experts=NAMES, aggregate=aggregate, sampling=HOT).experts)
    assert run_all(shared, [mine]) == [want]
    alone = [run_all(shared, [other])[0] for other in others]
    for every in (0, 2):
        assert run_all(shared, [*others[:2], mine, *others[2:]], every) == [*alone[:2], want, *alone[2:]]
    for chunk in (3, 16):
        assert run_all(make_engine(llama, max_num_batched_tokens=chunk), [mine, others[0]]) == [want, alone[0]]
    assert run_all(make_engine(llama, max_num_seqs=4), [*others, mine]) == [*alone, want]


@pytest.mark.parametrize("aggregate", ["vote", "mixture"])
def test_another_seed_another_answer(llama: Tiny, shared: Engine, aggregate: str) -> None:
    """Of all 64 bits; and without a seed, another one each time."""
    found = set()
    every = [0, 1, 2**32, 2**63, 2**64 - 1, None, None, None]
    for value in every:
        sampling = dataclasses.replace(HOT, seed=value)
        found.add(
            tuple(
                shared.ask(question(llama), experts=["suffix"], aggregate=aggregate, sampling=sampling)
                .experts[0]
                .tokens
            )
        )
    assert len(found) == len(every)


def test_equal_experts_sample_apart(llama: Tiny) -> None:
    """Two of one content: greedy they agree, sampled each draws for itself, or a committee of them would show no spread."""
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=2048)
    for name in ("one", "other"):
        engine.add_expert(soft_prompt(llama, 4, 1, name, "suffix"))
    greedy, hot = (
        tokens_by_name(engine.ask(question(llama), sampling=sampling).experts)
        for sampling in (SamplingParams(max_tokens=6), HOT)
    )
    assert greedy["one"] == greedy["other"] and hot["one"] != hot["other"]


def test_logprob_precedes_temperature(llama: Tiny, shared: Engine) -> None:
    """A sampled answer's log-probability is what `score` gives its tokens, whatever the temperature and the filters."""
    sampling = dataclasses.replace(HOT, temperature=2.5, top_k=40)
    for record in shared.ask(question(llama), experts=NAMES, sampling=sampling).experts:
        scored = shared.score(question(llama), [record.tokens], experts=[record.expert]).logprobs.item()
        assert record.logprob == pytest.approx(scored, abs=1e-4 * len(record.tokens))


# --- where an answer ends --------------------------------------------------------------------------------------------------------


def text_of(tiny: Tiny, tokens: Sequence[int]) -> str:
    return tiny.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def plain(llama: Tiny, shared: Engine) -> list[int]:
    """What the `suffix` expert answers when nothing stops it."""
    record = shared.ask(question(llama), experts=["suffix"], sampling=SamplingParams(max_tokens=40)).experts[0]
    assert (len(record.tokens), record.finish_reason) == (40, "length")
    return record.tokens


def borders(tiny: Tiny, tokens: list[int]) -> list[tuple[int, str]]:
    """Where two tokens of plain letters meet: how many tokens there are before the second, and the text of both."""
    texts = [text_of(tiny, [token]) for token in tokens]
    pairs = [
        (at + 1, a + b)
        for at, (a, b) in enumerate(itertools.pairwise(texts))
        if (a + b).isascii() and (a + b).isprintable()
    ]
    return [(at, text) for at, text in pairs if len(text) > 2]


def stopped(tiny: Tiny, tokens: list[int], stop: Sequence[str]) -> tuple[list[int], str]:
    """By definition: tokens up to the first that completes a stop string, text up to where the first stop string begins."""
    for end in range(1, len(tokens) + 1):
        text = text_of(tiny, tokens[:end])
        if any(part in text for part in stop):
            return tokens[:end], text[: min(text.index(part) for part in stop if part in text)]
    raise AssertionError(f"{stop} is nowhere in {text!r}")


def check_stop(tiny: Tiny, engine: Engine, plain: list[int], stop: Sequence[str]) -> str:
    """Runs with these stop strings, compares with the definition, also as events; returns the text."""
    tokens, text = stopped(tiny, plain, (stop,) if isinstance(stop, str) else stop)
    events = list(engine.stream(question(tiny), experts=["suffix"], sampling=SamplingParams(stop=stop, max_tokens=40)))
    assert isinstance(events[-1], Done)
    (record,) = events[-1].answer.experts
    assert (record.tokens, record.text, record.finish_reason) == (tokens, text, "stop")
    assert events[-1].answer.text == text
    pieces = [event for event in events if isinstance(event, Token)]
    assert [event.token for event in pieces] == tokens
    assert "".join(event.text for event in pieces) == text
    assert record.logprob == pytest.approx(sum(event.logprob for event in pieces))
    return text


def test_stop_strings_across_token_borders(llama: Tiny, shared: Engine, plain: list[int]) -> None:
    """Every string of two to four characters that begins in one token and ends in the next."""
    found = set()
    for at, text in borders(llama, plain)[:4]:
        first = len(text_of(llama, [plain[at - 1]]))
        for begin, end in itertools.product(range(first), range(first + 1, len(text) + 1)):
            if 2 <= end - begin <= 4:
                found.add(text[begin:end])
    assert len(found) >= 4
    for stop in sorted(found)[:12]:
        check_stop(llama, shared, plain, (stop,))
    check_stop(llama, shared, plain, min(found))  # a string alone, not in a list


def test_the_first_of_several_stop_strings(llama: Tiny, shared: Engine, plain: list[int]) -> None:
    late, early = borders(llama, plain)[-1][1], borders(llama, plain)[0][1]
    tokens, text = stopped(llama, plain, (early,))
    assert check_stop(llama, shared, plain, ("not in it", late, early)) == text
    assert check_stop(llama, shared, plain, (early[1:], early, late)) == text  # both end here; the longer begins first
    assert len(stopped(llama, plain, (late,))[0]) > len(tokens)


def test_a_stop_string_may_leave_nothing(llama: Tiny, shared: Engine) -> None:
    """The answer begins with one: no text, one token."""
    free = shared.ask(question(llama), experts=NAMES, sampling=SamplingParams(max_tokens=1)).experts
    first = next(record for record in free if record.text.isascii())
    got = shared.ask(question(llama), experts=[first.expert], sampling=SamplingParams(stop=first.text[0])).experts[0]
    assert (got.tokens, got.text, got.finish_reason) == (first.tokens, "", "stop")


def test_a_stop_string_in_the_last_token_is_a_stop(llama: Tiny, shared: Engine, plain: list[int]) -> None:
    _, stop = borders(llama, plain)[0]
    tokens, text = stopped(llama, plain, (stop,))
    for max_tokens, want in (
        (len(tokens), (tokens, text, "stop")),
        (len(tokens) - 1, (tokens[:-1], text_of(llama, tokens[:-1]), "length")),
    ):
        sampling = SamplingParams(stop=stop, max_tokens=max_tokens)
        got = shared.ask(question(llama), experts=["suffix"], sampling=sampling).experts[0]
        assert (got.tokens, got.text, got.finish_reason) == want


def test_a_stop_string_in_what_is_held_back_is_a_stop(llama: Tiny, shared: Engine) -> None:
    """Bytes that never become a character are text only once the answer has ended."""
    for seed in range(99):
        sampling = dataclasses.replace(HOT, seed=seed)
        whole = shared.ask(question(llama), experts=["suffix"], sampling=sampling).experts[0]
        texts = [text_of(llama, whole.tokens[: at + 1]) for at in range(len(whole.tokens))]
        at = next((at for at, text in enumerate(texts) if text.endswith("\ufffd")), None)
        if at is not None:
            break
    assert at is not None
    sampling = dataclasses.replace(sampling, stop="\ufffd", max_tokens=at + 1)
    got = shared.ask(question(llama), experts=["suffix"], sampling=sampling).experts[0]
    assert (got.tokens, got.finish_reason) == (whole.tokens[: at + 1], "stop")
    assert got.text == texts[at].partition("\ufffd")[0]


def test_half_a_stop_string_is_text_when_the_answer_ends(llama: Tiny, shared: Engine, plain: list[int]) -> None:
    """Held back while it might become one, handed out with the last token."""
    at, text = borders(llama, plain)[0]
    stop = text + "\N{SNOWMAN}"
    events = list(
        shared.stream(question(llama), experts=["suffix"], sampling=SamplingParams(stop=stop, max_tokens=at + 1))
    )
    pieces = [event.text for event in events if isinstance(event, Token)]
    assert isinstance(events[-1], Done)
    (record,) = events[-1].answer.experts
    whole = text_of(llama, plain[: at + 1])
    assert (record.text, record.finish_reason) == (whole, "length")
    assert "".join(pieces) == whole and "".join(pieces[:-1]) == whole[: -len(text)] and pieces[-1] == text


def test_every_branch_stops_for_itself_and_a_pool_as_one(llama: Tiny, shared: Engine) -> None:
    free = shared.ask(question(llama), experts=NAMES, sampling=SamplingParams(max_tokens=24)).experts
    _, stop = borders(llama, free[2].tokens)[0]
    got = shared.ask(question(llama), experts=NAMES, sampling=SamplingParams(stop=stop, max_tokens=24)).experts
    for before, after in zip(free, got, strict=True):
        if stop in before.text:
            assert (after.tokens, after.text) == stopped(
                llama, before.tokens, (stop,)
            ) and after.finish_reason == "stop"
        else:
            assert (after.tokens, after.text, after.finish_reason) == (before.tokens, before.text, "length")
    assert got[2].finish_reason == "stop"

    pool = shared.ask(
        question(llama), experts=NAMES, aggregate="mixture", sampling=SamplingParams(max_tokens=24)
    ).experts[0]
    _, stop = borders(llama, pool.tokens)[0]
    tokens, text = stopped(llama, pool.tokens, (stop,))
    answer = shared.ask(
        question(llama), experts=NAMES, aggregate="mixture", sampling=SamplingParams(stop=stop, max_tokens=24)
    )
    assert answer.text == text
    assert [(r.tokens, r.text, r.finish_reason) for r in answer.experts] == [(tokens, text, "stop")] * len(NAMES)


@pytest.mark.parametrize("aggregate", ["vote", "product"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_max_tokens(llama: Tiny, shared: Engine, aggregate: str, length: int) -> None:
    """Exactly so many, the first ones of a longer answer, and 'length'."""
    long, short = (
        shared.ask(
            question(llama), experts=NAMES[:2], aggregate=aggregate, sampling=SamplingParams(max_tokens=most)
        ).experts
        for most in (12, length)
    )
    for before, after in zip(long, short, strict=True):
        assert (after.tokens, after.finish_reason) == (before.tokens[:length], "length")
        assert after.text == text_of(llama, after.tokens)


LIMIT = 512  # max_position_embeddings of the tiny models


@pytest.mark.parametrize("experts", [[], *([name] for name in NAMES)], ids=lambda experts: "".join(experts) or "base")
@pytest.mark.parametrize("room", [1, 6])
def test_the_position_limit_ends_an_answer(llama: Tiny, shared: Engine, experts: list[str], room: int) -> None:
    """Soft prompt, context, header and answer fill the base's positions exactly, wherever the soft prompt stands."""
    m = sum(shared.expert(name).num_tokens for name in experts)
    asked = token_ids(llama, LIMIT - room - m - 3, seed=8), token_ids(llama, 3, seed=5)
    (got,) = shared.ask(asked, experts=experts, sampling=SamplingParams(max_tokens=40)).experts
    assert (len(got.tokens), got.finish_reason) == (room, "length")
    (less,) = shared.ask(asked, experts=experts, sampling=SamplingParams(max_tokens=room)).experts
    assert less == got


def test_the_position_limit_is_each_experts_own(llama: Tiny, shared: Engine) -> None:
    """A vote's longest soft prompt leaves the others the room that they have alone. A pool ends as one, where its longest does."""
    sizes = {name: shared.expert(name).num_tokens for name in NAMES}
    asked = token_ids(llama, LIMIT - max(sizes.values()) - 3 - 2, seed=8), token_ids(llama, 3, seed=5)
    sampling = SamplingParams(max_tokens=40)
    alone = {name: shared.ask(asked, experts=[name], sampling=sampling).experts[0] for name in NAMES}
    assert {name: len(record.tokens) for name, record in alone.items()} == {
        name: max(sizes.values()) - sizes[name] + 2 for name in NAMES
    }
    pool = shared.ask(asked, experts=NAMES, aggregate="mixture", sampling=sampling).experts
    assert [(len(record.tokens), record.finish_reason) for record in pool] == [(2, "length")] * len(NAMES)
    vote = shared.ask(asked, experts=NAMES, sampling=sampling).experts
    assert tokens_by_name(vote) == tokens_by_name(list(alone.values()))


def with_end_tokens(tiny: Tiny, folder: Path, ids: int | list[int]) -> Path:
    """The same base with other end tokens."""
    shutil.copytree(tiny.folder, folder)
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ids}))
    return folder


@pytest.mark.parametrize("several", [False, True])
def test_an_end_token_ends_an_answer(
    llama: Tiny, shared: Engine, plain: list[int], tmp_path: Path, several: bool
) -> None:
    """It is among the tokens and counts in the log-probability, but is not text."""
    at = next(at for at, token in enumerate(plain) if at >= 3 and token not in plain[:at])
    ends = [llama.tokenizer.eos_token_id, plain[at]]
    engine = Engine(
        with_end_tokens(llama, tmp_path / "base", ends if several else plain[at]), page_size=8, kv_cache_tokens=2048
    )
    engine.add_expert(shared.expert("suffix"))
    for aggregate in ("vote", "mixture"):
        for max_tokens in (40, at + 1):
            sampling = SamplingParams(max_tokens=max_tokens)
            events = list(engine.stream(question(llama), aggregate=aggregate, sampling=sampling))
            assert isinstance(events[-1], Done)
            (got,) = events[-1].answer.experts
            assert (got.tokens, got.finish_reason) == (plain[: at + 1], "stop")
            assert got.text == events[-1].answer.text == text_of(llama, plain[:at])
            assert "".join(event.text for event in events if isinstance(event, Token)) == got.text
    scored = shared.score(question(llama), [got.tokens], experts=["suffix"]).logprobs.item()
    assert got.logprob == pytest.approx(scored, abs=1e-4 * len(got.tokens))
    (short,) = engine.ask(question(llama), sampling=SamplingParams(max_tokens=at)).experts
    assert (short.tokens, short.finish_reason) == (plain[:at], "length")


def test_an_answer_may_be_empty(llama: Tiny, shared: Engine, plain: list[int], tmp_path: Path) -> None:
    """The first token is an end token."""
    engine = Engine(with_end_tokens(llama, tmp_path / "base", plain[0]), page_size=8, kv_cache_tokens=2048)
    engine.add_expert(shared.expert("suffix"))
    answer = engine.ask(question(llama))
    assert (answer.text, answer.experts[0].tokens, answer.experts[0].finish_reason) == ("", plain[:1], "stop")
    assert answer.votes == {"": 1.0} and answer.agreement == 1.0
