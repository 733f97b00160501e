"""A vote ends when it is decided: never before, and with the winner that it would have had."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import Tiny, soft_prompt, token_ids
from whispers_engine import Engine, SamplingParams
from whispers_engine.aggregate import answer_pattern, decided, normalise, voted_part
from whispers_engine.errors import WhispersError
from whispers_engine.request import Answer, Done, Finished, Request, Token

CHOICES = "abn"  # two that somebody has given, maybe, and one that is new


def winners(votes: dict[str, int]) -> set[str]:
    return {choice for choice, weight in votes.items() if weight == max(votes.values())}


@settings(max_examples=5000, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6)), max_size=6),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
)
def test_decided_is_when_every_completion_has_one_and_the_same_winner(
    given_votes: list[tuple[str, int]], running: list[int]
) -> None:
    votes: dict[str, int] = {}
    for choice, weight in given_votes:
        votes[choice] = votes.get(choice, 0) + weight
    total = sum(votes.values()) + sum(running)
    outcomes: list[set[str]] = []
    for completion in itertools.product("abcn", repeat=len(running)):
        final = dict(votes)
        for choice, weight in zip(completion, running, strict=True):
            final[choice] = final.get(choice, 0) + weight
        outcomes.append(winners(final))
    brute = all(len(outcome) == 1 for outcome in outcomes) and len(set.union(*outcomes)) == 1
    shares = {choice: weight / max(total, 1) for choice, weight in votes.items()}
    assert decided(shares, sum(weight / max(total, 1) for weight in running)) == brute


@pytest.fixture
def committee(llama: Tiny, engine: Engine) -> Engine:
    for index, placement in enumerate(("suffix", "detached", "prefix", "suffix", "detached")):
        engine.add_expert(soft_prompt(llama, 3, 40 + index, f"e{index}", placement))
    return engine


def ask(engine: Engine, question: list[int], early_end: bool, seed: int) -> Answer:
    sampling = SamplingParams(temperature=1.2, seed=seed, stop=("e", "t"), max_tokens=24)
    weights = {"e0": 5.0, "e1": 1.0, "e2": 1.5, "e3": 2.0, "e4": 0.0}
    return engine.ask(question, experts=weights, sampling=sampling, early_end=early_end)


def test_the_winner_is_the_same_and_branches_are_cut(llama: Tiny, committee: Engine) -> None:
    cuts = 0
    for seed in range(30):
        before = committee.cache_stats()["pages_free"]
        question = token_ids(llama, 12, seed)
        full, early = (ask(committee, question, early_end, seed) for early_end in (False, True))
        assert committee.cache_stats()["pages_free"] == before
        assert normalise(early.text) == normalise(full.text)
        assert all(record.finish_reason != "vote" for record in full.experts)
        for whole, record in zip(full.experts, early.experts, strict=True):
            assert record.tokens == whole.tokens[: len(record.tokens)]
            assert whole.text.startswith(record.text.rstrip("\N{REPLACEMENT CHARACTER}"))  # a character cut in two
            if record.finish_reason == "vote":
                cuts += 1
                assert len(record.tokens) < len(whole.tokens)
            else:
                assert (record.tokens, record.finish_reason) == (whole.tokens, whole.finish_reason)
        voted = [record for record in early.experts if record.finish_reason != "vote"]
        assert sum(early.votes.values()) == pytest.approx(sum(record.weight for record in voted))
        won = sum(record.weight for record in voted if normalise(record.text) == normalise(early.text))
        assert early.agreement == pytest.approx(won)
        assert early.usage["generated_tokens"] <= full.usage["generated_tokens"]
    assert cuts > 20


def test_a_stream_tells_who_was_cut_and_nothing_after(llama: Tiny, committee: Engine) -> None:
    sampling = SamplingParams(temperature=1.2, seed=3, stop=("e", "t"), max_tokens=24)
    events = list(
        committee.stream(token_ids(llama, 12, 3), experts={"e0": 5.0, "e1": 1.0, "e3": 1.0}, sampling=sampling)
    )
    ended: set[str | None] = set()
    for event in events:
        if isinstance(event, Finished):
            assert event.answer.expert not in ended
            ended.add(event.answer.expert)
        if isinstance(event, Token):
            assert event.expert not in ended
    assert ended == {"e0", "e1", "e3"} and isinstance(events[-1], Done)


@pytest.mark.parametrize("aggregate", ["mixture", "product", "delegate"])
def test_only_votes_end_early(llama: Tiny, committee: Engine, aggregate: str) -> None:
    sampling = SamplingParams(temperature=1.0, seed=1, stop=("e",), max_tokens=12)
    answers = [
        committee.ask(
            token_ids(llama, 9, 1),
            experts={"e0": 5.0, "e1": 1.0},
            aggregate=aggregate,
            sampling=sampling,
            early_end=end,
        )
        for end in (True, False)
    ]
    assert answers[0].text == answers[1].text and answers[0].experts == answers[1].experts


def test_early_end_is_yes_or_no(llama: Tiny, engine: Engine) -> None:
    with pytest.raises(WhispersError, match="early_end: 1; accepted: True or False"):
        engine.submit(Request(token_ids(llama, 4, 0), early_end=1))  # type: ignore[arg-type]


# --- what is voted on ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, pattern, part",
    [
        ("Answer: rice.", r"Answer: (\w+)", "rice"),
        ("Answer: rice. No. Answer: bread", r"Answer: (\w+)", "bread"),  # the last one counts
        ("I do not know", r"Answer: (\w+)", "I do not know"),
        ("Answer: rice", None, "Answer: rice"),
        ("yes", r"yes(!)?", ""),  # a group that took no part
    ],
)
def test_voted_part(text: str, pattern: str | None, part: str) -> None:
    assert voted_part(text, answer_pattern(pattern)) == part


@pytest.mark.parametrize("pattern", ["(", "no group", "(two) (groups)", 7])
def test_patterns_that_are_refused(llama: Tiny, engine: Engine, pattern: object) -> None:
    with pytest.raises(
        WhispersError, match=r"answer_pattern: .*accepted: None, or a regular expression with one group"
    ):
        engine.ask("tea", answer_pattern=pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize("early_end", [False, True])
def test_a_committee_votes_on_the_part(llama: Tiny, committee: Engine, early_end: bool) -> None:
    """Random answers differ as a whole; by their first character some agree."""
    sampling = SamplingParams(temperature=1.0, seed=2, max_tokens=6)
    question, experts = token_ids(llama, 9, 2), ["e0", "e1", "e2", "e3"]
    pattern = r"(?s)\A\s*(.).*"
    whole = committee.ask(question, experts=experts, sampling=sampling, early_end=False)
    answer = committee.ask(question, experts=experts, sampling=sampling, early_end=early_end, answer_pattern=pattern)
    first = [record.text.strip()[:1] for record in whole.experts]
    weights = {normalise(c): sum(0.25 for other in first if normalise(other) == normalise(c)) for c in first}
    assert answer.agreement == pytest.approx(max(weights.values()))
    assert {normalise(part): weight for part, weight in answer.votes.items()} == pytest.approx(weights)
    assert answer.text in [record.text for record in whole.experts]
