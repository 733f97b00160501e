"""Votes: tallies equal a brute force in exact arithmetic, answers count as the same when they should, and an engine's committee follows.

The brute force knows weights as integers; the tally gets them as the floats that they make, with the rounding that comes with it.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from tests.engine.conftest import Tiny, kv_prompt, soft_prompt, token_ids
from whispers_engine import Engine, Expert, SamplingParams
from whispers_engine.aggregate import Ballot, normalise, tally
from whispers_kernels import pool_logits


@dataclass(frozen=True)
class Vote:
    """A ballot whose weight is exact."""

    expert: str
    weight: int
    choice: str
    mean_logprob: float

    def ballot(self, total: int) -> Ballot:
        return Ballot(self.expert, self.weight / total, self.choice, self.mean_logprob)


@dataclass(frozen=True)
class Outcome:
    """What a brute force finds, and how: who leads each choice, best choice first, with its exact weight."""

    leaders: list[tuple[str, Fraction]]
    decided_by: str
    bits: float


def count(votes: Sequence[Vote], total: int) -> Outcome:
    """Takes the best choice away, again and again, until none is left."""
    left, leaders, decided_by = list(votes), [], "one choice"
    while left:
        sums = {
            choice: sum(vote.weight for vote in left if vote.choice == choice) for choice in {v.choice for v in left}
        }
        tied = [vote for vote in left if sums[vote.choice] == max(sums.values())]
        rules = {
            "weight": tied,
            "heaviest": (tied := [vote for vote in tied if vote.weight == max(v.weight for v in tied)]),
            "likeliest": (tied := [vote for vote in tied if vote.mean_logprob == max(v.mean_logprob for v in tied)]),
            "name": (tied := [vote for vote in tied if vote.expert == min(v.expert for v in tied)]),
        }
        leader = tied[0]
        if not leaders and len(sums) > 1:  # the first rule that leaves one choice
            decided_by = next(rule for rule, kept in rules.items() if len({vote.choice for vote in kept}) == 1)
        leaders.append((leader.expert, Fraction(sums[leader.choice], total)))
        left = [vote for vote in left if vote.choice != leader.choice]
    finished = sum(vote.weight for vote in votes)
    parts = [share * total / finished for _, share in leaders if share] if finished else []
    return Outcome(leaders, decided_by, -sum(float(part) * math.log2(part) for part in parts))


@st.composite
def elections(draw: st.DrawFn) -> tuple[list[Vote], int]:
    """Votes of branches that finished, and the weight asked, in the same unit. Few values each, so that ties of every kind occur."""
    one = st.tuples(
        st.integers(0, 4), st.sampled_from(("rice", "bread", "tea")), st.sampled_from((-0.5, -1.0, -math.inf))
    )
    votes = [
        Vote(name, *rest) for name, rest in zip("abcdefgh", draw(st.lists(one, min_size=1, max_size=8)), strict=False)
    ]
    return votes, draw(st.sampled_from((1, 10, 100)))  # 3 of unit 10 is 0.3


def test_tally_is_the_brute_force() -> None:
    """Five thousand elections; every rule decides some of them, and some would go wrong if floats were compared as they are."""
    decided: Counter[str] = Counter()

    @seed(0)
    @settings(max_examples=5000, deadline=None, database=None)
    @given(elections(), st.integers(0, 99))
    def check(election: tuple[list[Vote], int], shuffle: int) -> None:
        votes, unit = election
        asked = sum(vote.weight for vote in votes) + 2  # one of weight 2 did not finish
        total = asked if unit == 1 else unit
        want = count(votes, total)
        decided[want.decided_by] += 1
        floats: dict[str, float] = {}
        for vote in votes:
            floats[vote.choice] = floats.get(vote.choice, 0.0) + vote.weight / total
        leader_choices = [next(v.choice for v in votes if v.expert == expert) for expert, _ in want.leaders]
        decided["floats"] += floats[leader_choices[0]] < max(floats.values())

        for order in (votes, random.Random(shuffle).sample(votes, len(votes))):
            got = tally([vote.ballot(total) for vote in order], asked / total)
            assert [order[index].expert for index, _ in got.votes] == [expert for expert, _ in want.leaders]
            assert [weight for _, weight in got.votes] == pytest.approx([float(share) for _, share in want.leaders])
            assert order[got.winner].expert == want.leaders[0][0]
            assert got.agreement == pytest.approx(float(want.leaders[0][1] * total / asked))
            assert got.diversity_entropy == pytest.approx(want.bits, abs=1e-12)

    check()
    assert (
        set(decided) == {"one choice", "weight", "heaviest", "likeliest", "name", "floats"}
        and min(decided.values()) > 0
    )


@settings(max_examples=300, deadline=None)
@given(elections(), st.sampled_from(("rice", "bread", "tea")))
def test_a_winner_from_elsewhere_keeps_the_votes(election: tuple[list[Vote], int], winner: str) -> None:
    """A pool may choose what few voted for, or nobody: votes and entropy stay, the agreement is with the pool."""
    votes, _ = election
    asked = sum(vote.weight for vote in votes) + 1
    ballots = [vote.ballot(asked) for vote in votes]
    free, bound = tally(ballots), tally(ballots, winner=winner)
    assert (bound.votes, bound.diversity_entropy) == (free.votes, free.diversity_entropy)
    share = Fraction(sum(vote.weight for vote in votes if vote.choice == winner), asked)
    assert bound.agreement == pytest.approx(float(share))
    if any(vote.choice == winner for vote in votes):
        assert votes[bound.winner].choice == winner
    else:
        assert bound.winner == -1


@pytest.mark.parametrize(
    ("pair", "single", "wins"),
    [
        ((0.1, 0.2), 0.3, "single"),  # 0.30000000000000004: as floats, the pair would win
        ((1 / 6, 1 / 6), 1 / 3, "single"),
        ((0.7, 0.1), 0.8, "single"),
        ((0.1, 0.21), 0.3, "pair"),
        ((0.1, 0.2), 0.31, "single"),
    ],
)
def test_two_against_one(pair: tuple[float, float], single: float, wins: str) -> None:
    """Equal up to rounding is a tie, and the heaviest expert decides it, although the others are likelier and first by name."""
    ballots = [
        Ballot("a", pair[0], "pair", -0.1),
        Ballot("b", pair[1], "pair", -0.1),
        Ballot("c", single, "single", -9.0),
    ]
    assert ballots[tally(ballots).winner].choice == wins


def test_a_tie_is_one_wherever_the_weights_lie() -> None:
    """0.004 + 0.343 is 0.347, and so it stays when all are divided by their sum, 1.024."""
    weights = [0.004, 0.343, 0.347, 0.33]
    shares = [weight / math.fsum(weights) for weight in weights]
    ballots = [Ballot(*ballot, -1.0) for ballot in zip("abcd", shares, ("pair", "pair", "single", "less"), strict=True)]
    assert ballots[tally(ballots).winner].choice == "single"


def test_equal_shares_have_whole_bits() -> None:
    for choices in (1, 2, 4, 8):
        got = tally([Ballot(str(i), 1 / choices, i, 0.0) for i in range(choices)])
        assert (got.diversity_entropy, got.agreement) == (math.log2(choices), 1 / choices)


# --- which answers are the same ------------------------------------------------------------------------------------------------

SAME = [
    [
        "Rice",
        "rice",
        " RICE\n",
        "rice.",
        "Rice!?",
        "rice …",
        "ｒｉｃｅ",
        "Ｒｉｃｅ．",
        "rice。",
        "rice 。",
        "\u3000rice！",
    ],
    ["寿司", "寿司。", "寿司！？", "「寿司」"[1:]],
    ["straße", "STRASSE", "Strasse."],
    ["café", "cafe\u0301", "CAFÉ", "café»", "café”"],
    ["ﬁsh", "fish", "FISH؟", "fish।", "fish။"],
    ["ταΐζω", "ΤΑΪ́ΖΩ"],  # casefolding takes one of them apart, and only half of the other
    ["2", "２", "²"],
    ["", ".", " ?! ", "…", "。"],
    ["(rice", "(rice)"],
]


@pytest.mark.parametrize("answers", SAME, ids=ascii)
def test_the_same_answer_in_other_clothes(answers: list[str]) -> None:
    assert {normalise(answer) for answer in answers} == {normalise(answers[0])}


def test_different_answers_stay_different() -> None:
    firsts = [answers[0] for answers in SAME]
    more = ["cafe", "ri ce", "ri.ce", ".rice", "rice+", "C", "C++", "C#", "15%", "$5", "5$", "5€", "1.5", "15"]
    assert len({normalise(answer) for answer in firsts + more}) == len(firsts) + len(more)


EVERY = [chr(code) for code in range(0x10000)]  # of the basic plane
# A few, such as U+203E, are a space and a combining mark under NFKC: no punctuation any more.
PUNCTUATION = [
    c
    for c in EVERY
    if all(unicodedata.category(part)[0] == "P" and part not in "%‰#&@*" for part in unicodedata.normalize("NFKC", c))
]
SPACES = [c for c in EVERY if c.isspace()]


@settings(max_examples=500, deadline=None)
@given(
    st.text(SPACES, max_size=3),
    st.sampled_from(["rice", "Straße", "café", "寿司", "(a) b", "चावल", "ﬁsh", "a.b", "½ x", "Ǆ"]),
    st.text([*PUNCTUATION, *SPACES], max_size=5),
)
def test_space_and_final_punctuation_do_not_count(lead: str, answer: str, tail: str) -> None:
    """Whatever Unicode calls punctuation and white space, in any order, but for signs that change a meaning: 50%, C#."""
    assert normalise(lead + answer + tail) == normalise(answer) != ""


def test_there_is_punctuation_beyond_ascii() -> None:
    assert len(PUNCTUATION) > 500 and set("。！？…»”؟।") <= set(PUNCTUATION)


# --- in the engine -------------------------------------------------------------------------------------------------------------

QUESTION = "what do people eat"


def teach(tiny: Tiny, engine: Engine, name: str, answer: str) -> Expert:
    """A suffix expert, trained until it gives this answer to the question."""
    context, header = engine.chat.split(QUESTION)
    target = torch.tensor([*tiny.tokenizer.encode(answer, add_special_tokens=False), tiny.tokenizer.eos_token_id])
    embed = tiny.hf.get_input_embeddings()
    with torch.no_grad():
        before, after = embed(torch.tensor(context)), embed(torch.tensor([*header, *target[:-1].tolist()]))
        scale = embed.weight.std()
    soft = (torch.randn(6, tiny.hidden, generator=torch.Generator().manual_seed(0)) * scale).requires_grad_()
    optimizer = torch.optim.Adam([soft], lr=0.3)
    for _ in range(300):
        logits = tiny.hf(inputs_embeds=torch.cat((before, soft, after))[None]).logits[0, -len(target) :]
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        if loss.max() < 0.3:  # each token more likely than all others together
            return Expert(name, soft.detach(), "suffix")
        (soft.grad,) = torch.autograd.grad(loss.sum(), soft)
        optimizer.step()
    raise AssertionError(f"{answer!r} was not learned: {loss}")


def test_a_vote_merges_answers_that_are_the_same(llama: Tiny, engine: Engine) -> None:
    """Two lighter experts say the same in other words, and outvote a heavier one."""
    answers = {"upper": "Rice.", "lower": "rice", "other": "tea!"}
    for name, answer in answers.items():
        engine.add_expert(teach(llama, engine, name, answer))
    weights = {"upper": 0.28, "lower": 0.3, "other": 0.42}
    got = engine.ask(QUESTION, experts=weights, sampling=SamplingParams(max_tokens=16))
    assert {record.expert: (record.text, record.finish_reason) for record in got.experts} == {
        name: (answer, "stop") for name, answer in answers.items()
    }
    assert got.text == "rice"  # as the heavier of the two puts it
    assert list(got.votes) == ["rice", "tea!"]
    assert got.votes == pytest.approx({"rice": 0.58, "tea!": 0.42})
    assert got.agreement == pytest.approx(0.58)
    assert got.diversity_entropy == pytest.approx(-0.58 * math.log2(0.58) - 0.42 * math.log2(0.42))
    assert got.options is None

    upper = engine.ask(QUESTION, experts={"upper": 2, "lower": 1, "other": 2.9}, sampling=SamplingParams(max_tokens=16))
    assert upper.text == "Rice." and list(upper.votes) == ["Rice.", "tea!"]


@dataclass(frozen=True)
class Split:
    """Three experts and two options: x and y prefer the first, z the second."""

    engine: Engine
    question: tuple[list[int], list[int]]
    options: list[list[int]]
    texts: list[str]
    logprobs: torch.Tensor  # [3, 2]


def split_over(llama: Tiny, engine: Engine, accepted: str) -> Split:
    """The options that divide the three experts most, of the single tokens that read like this."""
    question = (token_ids(llama, 20, seed=1), token_ids(llama, 3, seed=2))
    ids = [token for token in range(llama.vocab) if re.fullmatch(accepted, llama.tokenizer.decode([token]))]
    found = engine.score(question, [[token] for token in ids], experts=["x", "y", "z"]).logprobs
    prefers = found[:, :, None] - found[:, None]  # [expert, first, second]
    margin = torch.stack((prefers[0], prefers[1], -prefers[2])).amin(0)
    first, second = divmod(int(margin.argmax()), len(ids))
    assert margin.max() > 0.1
    options = [[ids[first]], [ids[second]]]
    texts = [llama.tokenizer.decode(option) for option in options]
    return Split(engine, question, options, texts, found[:, [first, second]])


@pytest.fixture
def committee(llama: Tiny, engine: Engine) -> Engine:
    engine.add_expert(soft_prompt(llama, 5, 1, "x", "suffix"))
    engine.add_expert(kv_prompt(llama, 3, 2, "y", "detached"))
    engine.add_expert(soft_prompt(llama, 4, 3, "z", "prefix"))
    return engine


@pytest.fixture
def split(llama: Tiny, committee: Engine) -> Split:
    return split_over(llama, committee, "[a-z]+")


@pytest.mark.parametrize(
    ("weights", "wins", "agreement"),
    [
        ({"x": 1, "y": 1, "z": 1}, 0, 2 / 3),
        ({"x": 1, "y": 1, "z": 3}, 1, 0.6),
        ({"x": 1, "y": 2.5, "z": 3}, 0, 3.5 / 6.5),
        ({"x": 0.1, "y": 0.2, "z": 0.3}, 1, 0.5),  # a tie
        ({"z": 0.3, "y": 0.2, "x": 0.1}, 1, 0.5),
        ({"x": 3, "y": 0, "z": 3}, None, 0.5),  # a tie of equals: the likelier of the two
        ({"x": 0, "y": 0, "z": 7}, 1, 1.0),
    ],
)
def test_weights_decide_a_vote_over_options(
    split: Split, weights: dict[str, float], wins: int | None, agreement: float
) -> None:
    if wins is None:
        wins = int(split.logprobs[2, 1] > split.logprobs[0, 0])
    got = split.engine.ask(split.question, split.options, experts=weights)
    total = sum(weights.values())
    assert [name for name, _ in got.routing] == list(weights)
    assert [weight for _, weight in got.routing] == pytest.approx([weight / total for weight in weights.values()])
    assert got.text == split.texts[wins]
    assert got.agreement == pytest.approx(agreement)
    for (name, weight), record in zip(got.routing, got.experts, strict=True):
        mine = int(name == "z")
        assert (record.expert, record.weight, record.text) == (name, weight, split.texts[mine])
        assert (record.tokens, record.finish_reason) == (split.options[mine], "option")
        assert record.logprob == pytest.approx(split.logprobs["xyz".index(name), mine].item(), abs=1e-4)
    both = {split.texts[wins]: agreement, split.texts[1 - wins]: 1 - agreement}
    assert list(got.votes) == list(both) and got.votes == pytest.approx(both)
    assert got.diversity_entropy == pytest.approx(-sum(p * math.log2(p) for p in both.values() if p))


def test_options_that_read_the_same_are_counted_together(llama: Tiny, committee: Engine) -> None:
    """Bytes that are no character on their own: two options, one text. No vote may get lost."""
    split = split_over(llama, committee, "\ufffd")
    weights = {"x": 0.2, "y": 0.2, "z": 0.6}
    got = committee.ask(split.question, split.options, experts=weights)
    assert [record.tokens for record in got.experts] == [split.options[0], split.options[0], split.options[1]]
    assert got.votes == pytest.approx({"\ufffd": 1.0})


@pytest.mark.parametrize("free", [True, False])
def test_delegate_runs_the_heaviest_alone(split: Split, free: bool) -> None:
    """The same answer as from that expert alone, and no more rows computed for it."""
    options, sampling = None if free else split.options, SamplingParams(max_tokens=6)
    weights = {"x": 1, "z": 3, "y": 2}
    alone = split.engine.ask(split.question, options, experts=["z"], sampling=sampling)
    got = split.engine.ask(split.question, options, experts=weights, aggregate="delegate", sampling=sampling)
    assert got.routing == [("x", pytest.approx(1 / 6)), ("z", 0.5), ("y", pytest.approx(1 / 3))]
    assert [record.expert for record in got.experts] == ["z"]
    assert (got.experts[0].text, got.experts[0].tokens) == (alone.experts[0].text, alone.experts[0].tokens)
    assert got.experts[0].logprob == pytest.approx(alone.experts[0].logprob, abs=1e-4)
    assert (got.text, got.agreement, got.diversity_entropy) == (alone.text, 1.0, 0.0)
    for key in ("context_tokens", "branch_tokens", "generated_tokens"):
        assert got.usage[key] == alone.usage[key]


def test_the_worked_numbers_of_the_docs() -> None:
    """`docs/aggregation.md` shows three experts under each rule."""
    page = (Path(__file__).parents[2] / "docs" / "aggregation.md").read_text(encoding="utf-8")
    shares = torch.tensor([0.5, 0.3, 0.2])
    logits = torch.tensor([[0.40, 0.35, 0.25], [0.30, 0.60, 0.10], [0.05, 0.15, 0.80]]).log()
    one = torch.tensor([0, 3], dtype=torch.int32)

    def pooled(logits: torch.Tensor, rule: str) -> str:
        return " | ".join(f"{value:.3f}" for value in pool_logits(logits, shares, one, rule)[0].exp().tolist())

    outcome = tally([Ballot(f"e{at}", float(w), at, -1.0) for at, w in enumerate(shares.tolist())])
    assert f"agreement {outcome.agreement:.2f}, entropy {outcome.diversity_entropy:.3f} bits" in page
    for rule in ("mixture", "product"):
        assert f"| `{rule}` | {pooled(logits, rule)} |" in page
    doubted = logits.clone()
    doubted[1, 2] = math.log(0.001)
    # The table's row is no distribution any more; the pools are of what the docs say, so nothing is normalised before.
    linear = float(shares @ doubted.exp()[:, 2])
    weights = (shares @ doubted).exp()
    assert f"from 0.315 to {linear:.3f} in the mixture" in page
    assert f"from 0.289 to {float(weights[2] / weights.sum()):.3f} in the product" in page.replace("\n", " ")
