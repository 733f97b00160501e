"""`compose`: the base's own answer to a prompt that holds the experts' answers, delivered as the committee's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.conftest import Tiny, soft_prompt
from whispers_engine import Engine, SamplingParams
from whispers_engine.compose import composition
from whispers_engine.errors import WhispersError
from whispers_engine.request import Done, Failed, Finished, Request, Token

QUESTION = "what do people eat for breakfast"
SAMPLING = SamplingParams(max_tokens=6)
WEIGHTS = {"e0": 3.0, "e1": 1.0}


@pytest.fixture
def committee(llama: Tiny, engine: Engine) -> Engine:
    for index, placement in enumerate(("suffix", "detached")):
        engine.add_expert(soft_prompt(llama, 3, 60 + index, f"e{index}", placement))
    return engine


@pytest.mark.parametrize(
    "question",
    [
        QUESTION,
        [
            {"role": "user", "content": "tea"},
            {"role": "assistant", "content": "bread"},
            {"role": "user", "content": QUESTION},
        ],
    ],
    ids=["string", "messages"],
)
@pytest.mark.parametrize(
    "sampling", [SAMPLING, SamplingParams(temperature=1.0, seed=5, max_tokens=6)], ids=["greedy", "sampled"]
)
def test_it_is_what_the_base_says_to_the_composition(
    committee: Engine, question: Any, sampling: SamplingParams
) -> None:
    composed = committee.ask(question, experts=WEIGHTS, aggregate="compose", sampling=sampling)
    voted = committee.ask(question, experts=WEIGHTS, sampling=sampling, early_end=False)
    assert composed.experts == voted.experts and composed.votes == voted.votes
    assert (composed.agreement, composed.routing) == (voted.agreement, voted.routing)
    messages = composition(question, voted.experts)
    assert (
        len(messages) == (1 if isinstance(question, str) else 3)
        and messages[:-1] == list(question)[: len(messages) - 1]
    )
    for record in voted.experts:
        assert record.text.strip() in messages[-1]["content"]
    assert QUESTION in messages[-1]["content"] and "75%" in messages[-1]["content"]
    alone = committee.ask(messages, experts=[], sampling=sampling)
    assert composed.text == alone.text
    for name, count in composed.usage.items():
        if name != "context_tokens_cached":  # the composition asked for alone finds its own pages
            assert count == voted.usage[name] + alone.usage[name], name
    assert composed.timing["total"] >= composed.timing["compose"] > 0


def test_its_tokens_come_as_the_committees_own(committee: Engine) -> None:
    events = list(committee.stream(QUESTION, experts=WEIGHTS, aggregate="compose", sampling=SAMPLING))
    ends = [event.answer.expert for event in events if isinstance(event, Finished)]
    assert sorted(ends) == ["e0", "e1"]
    composed = [event for event in events if isinstance(event, Token) and event.expert is None]
    last = events[-1]
    assert isinstance(last, Done) and "".join(token.text for token in composed) == last.answer.text
    assert {event.request_id for event in events} == {last.request_id}


def test_submitted_beside_another_request(committee: Engine) -> None:
    first = committee.submit(Request(QUESTION, experts=WEIGHTS, aggregate="compose", sampling=SAMPLING))
    second = committee.submit(Request("rice, bread, tea", experts=["e1"], sampling=SAMPLING))
    done = {}
    while committee.busy:
        done.update({event.request_id: event.answer for event in committee.step() if isinstance(event, Done)})
    assert set(done) == {first, second}
    assert done[first].text == committee.ask(QUESTION, experts=WEIGHTS, aggregate="compose", sampling=SAMPLING).text


def test_abandoned_at_any_event_it_leaves_no_page(committee: Engine) -> None:
    def stream() -> Any:
        return committee.stream(QUESTION, experts=WEIGHTS, aggregate="compose", sampling=SAMPLING)

    for stop in range(len(list(stream())) + 1):
        before = committee.cache_stats()
        events = stream()
        for _ in range(stop):
            next(events)
        events.close()
        after = committee.cache_stats()
        assert (after["pages_free"], after["pages_branch"], after["pages_context"]) == (before["pages_free"], 0, 0)
        assert not committee.busy


def test_what_cannot_be_composed_is_refused(committee: Engine) -> None:
    with pytest.raises(WhispersError, match="accepted with options: vote"):
        committee.ask(QUESTION, ["rice", "bread"], experts=WEIGHTS, aggregate="compose")
    for question in ([5, 6, 7], ([5, 6], [7])):
        with pytest.raises(WhispersError, match="token ids cannot be quoted"):
            committee.ask(question, experts=WEIGHTS, aggregate="compose")


def test_answers_too_long_for_the_base_fail_with_a_reason(committee: Engine) -> None:
    sampling = SamplingParams(max_tokens=220)  # two of these and the prompt pass 512 positions
    committee.submit(Request(QUESTION, experts=WEIGHTS, aggregate="compose", sampling=sampling))
    events = []
    while committee.busy:
        events += committee.step()
    failed = [event for event in events if isinstance(event, Failed)]
    assert len(failed) == 1 and "too long a question" in failed[0].error
    assert committee.cache_stats()["pages_branch"] == 0
    with pytest.raises(WhispersError, match="too long a question"):
        committee.ask(QUESTION, experts=WEIGHTS, aggregate="compose", sampling=sampling)
