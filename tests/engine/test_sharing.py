"""What is shared is shared, counted in pages; what is not shared changes nothing: a branch's result is its own in any company."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import ceil

import pytest
import torch

from tests.engine.conftest import Tiny, kv_prompt, soft_prompt, token_ids
from whispers_engine import Done, Engine, Expert, Failed, Request, Routed, SamplingParams, Token, WhispersError

PAGE = 8
CASES = [
    ("embeddings", "prefix"),
    ("embeddings", "suffix"),
    ("embeddings", "detached"),
    ("kv", "prefix"),
    ("kv", "detached"),
]


def committee(tiny: Tiny, size: int) -> list[Expert]:
    """Experts of all placements and kinds in turn, of lengths 1 to 11."""
    return [
        (soft_prompt if kind == "embeddings" else kv_prompt)(tiny, 1 + (7 * i) % 11, 100 + i, f"e{i}", placement)
        for i, (kind, placement) in zip(range(size), CASES * size, strict=False)
    ]


def make_engine(tiny: Tiny, experts: list[Expert], **settings: int) -> Engine:
    engine = Engine(tiny.folder, **{"page_size": PAGE, "kv_cache_tokens": 16384, **settings})
    for expert in experts:
        engine.add_expert(expert)
    return engine


def used(engine: Engine) -> tuple[int, int]:
    stats = engine.cache_stats()
    return stats["pages_context"], stats["pages_branch"]


def check_all_back(engine: Engine) -> None:
    stats = engine.cache_stats()
    assert used(engine) == (0, 0)
    assert stats["pages_free"] == stats["pages_total"] - stats["pages_pinned"]
    assert engine.pool.available == stats["pages_free"]  # no reservation is left over either
    assert not engine.busy


# --- counted pages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 8, 9, 50])
@pytest.mark.parametrize("placement", ["suffix", "detached"])
def test_one_context_for_all_experts(llama: Tiny, placement: str, length: int) -> None:
    experts = [soft_prompt(llama, 5, i, f"e{i}", placement) for i in range(20)]
    engine = make_engine(llama, experts)
    engine._scheduler.decoder = None  # which takes a branch's pages ahead, out of what is reserved for it
    pinned = 20 if placement == "detached" else 0
    assert engine.cache_stats()["pages_pinned"] == pinned
    question = (token_ids(llama, length, 1), token_ids(llama, 4, 2))
    sampling = SamplingParams(max_tokens=30)
    tokens = dict.fromkeys(engine.experts, 0)
    for event in engine.stream(question, sampling=sampling):
        if isinstance(event, Token) and event.expert is not None:
            tokens[event.expert] += 1
        if (
            isinstance(event, Token)
            and event.expert == "e19"
            and set(tokens.values()) == {tokens["e19"]}
            and tokens["e19"] < 3
        ):
            # Every branch has its header and all its tokens but the newest in pages of its own.
            own = (5 if placement == "suffix" else 0) + 4 + tokens["e19"] - 1
            assert used(engine) == (ceil(length / PAGE), 20 * ceil(own / PAGE))
    assert max(tokens.values()) > 2
    check_all_back(engine)


def test_prefix_contexts_are_their_own(llama: Tiny) -> None:
    """A context that sees a soft prompt is another function of the same tokens: nothing may be shared."""
    engine = make_engine(llama, [soft_prompt(llama, 5, i, f"e{i}", "prefix") for i in range(3)])
    question = (token_ids(llama, 20, 1), token_ids(llama, 4, 2))
    stream = engine.stream(question, sampling=SamplingParams(max_tokens=4))
    for event in stream:
        if isinstance(event, Token):
            assert used(engine)[0] == 3 * ceil(20 / PAGE)
            break
    stream.close()
    check_all_back(engine)


def test_second_request_computes_only_the_rest(llama: Tiny) -> None:
    engine = make_engine(llama, committee(llama, 5))
    first, header = token_ids(llama, 40, 1), token_ids(llama, 4, 2)
    cold = engine.score((first, header), [[5], [6, 7]])
    assert cold.usage["context_tokens_cached"] == 0
    contexts = 3  # the base's, and one for each of the two prefix experts
    again = engine.score((first, header), [[5], [6, 7]])
    # 40 tokens fill five pages, and the last token is always computed: four pages are found.
    assert again.usage["context_tokens_cached"] == contexts * 32
    torch.testing.assert_close(again.logprobs, cold.logprobs, atol=1e-4, rtol=0)
    branching = [*first[:19], *token_ids(llama, 30, 9)]
    other = engine.score((branching, header), [[5], [6, 7]])
    assert other.usage["context_tokens_cached"] == contexts * 16
    fresh = make_engine(llama, committee(llama, 5)).score((branching, header), [[5], [6, 7]])
    torch.testing.assert_close(other.logprobs, fresh.logprobs, atol=1e-4, rtol=0)


def test_kept_pages_make_way(llama: Tiny) -> None:
    """A pool that cannot keep every context still answers all, and rightly."""
    small = make_engine(llama, committee(llama, 3), kv_cache_tokens=56 * PAGE)
    large = make_engine(llama, committee(llama, 3))
    for seed in [*range(6), 0, 3]:
        question = (token_ids(llama, 60, seed), token_ids(llama, 4, 2))
        got, want = (engine.score(question, [[5], [6, 7]]).logprobs for engine in (small, large))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        check_all_back(small)


def test_a_renamed_copy_shares_and_a_changed_one_does_not(llama: Tiny) -> None:
    """The hash covers an expert's content, not its name."""
    one = soft_prompt(llama, 5, 1, "one", "prefix")
    copy = Expert("copy", one.embeddings, "prefix")
    changed = Expert("changed", one.embeddings * 1.5, "prefix")
    engine = make_engine(llama, [one, copy, changed])
    question = (token_ids(llama, 40, 1), token_ids(llama, 4, 2))
    score = {name: engine.score(question, [[5]], experts=[name]) for name in ("one", "copy", "changed")}
    assert [score[name].usage["context_tokens_cached"] for name in ("one", "copy", "changed")] == [0, 32, 0]
    torch.testing.assert_close(score["one"].logprobs, score["copy"].logprobs, atol=1e-4, rtol=0)
    assert (score["one"].logprobs - score["changed"].logprobs).abs().max() > 0.01


# --- pages come back -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", ["vote", "mixture", "product", "delegate"])
def test_a_stream_abandoned_at_any_event(llama: Tiny, aggregate: str) -> None:
    engine = make_engine(llama, committee(llama, 5), max_num_batched_tokens=16, max_num_seqs=16)
    question = (token_ids(llama, 30, 1), token_ids(llama, 4, 2))
    sampling = SamplingParams(max_tokens=5)

    def stream(options: list[list[int]] | None) -> Iterator[object]:
        return engine.stream(question, options, aggregate=aggregate, sampling=sampling)

    for options in (None, [[5, 6, 7], [8]]):
        assert sum(1 for _ in stream(options)) >= 3
        check_all_back(engine)
        for stop in itertools.count():
            events = stream(options)
            seen = list(itertools.islice(events, stop))
            events.close()  # type: ignore[attr-defined]
            check_all_back(engine)
            if len(seen) < stop:  # the last one: it was over already
                break
        stream(options)  # never started
        check_all_back(engine)


def test_pages_come_back_after_an_error(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llama, committee(llama, 5))
    question = (token_ids(llama, 30, 1), token_ids(llama, 4, 2))
    want = engine.ask(question, sampling=SamplingParams(max_tokens=6))
    forward, calls = engine.model.forward, []

    def breaks(*args: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return forward(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.model, "forward", breaks)
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.ask(question, sampling=SamplingParams(max_tokens=6))
    check_all_back(engine)
    monkeypatch.undo()
    assert engine.ask(question, sampling=SamplingParams(max_tokens=6)).experts == want.experts


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of luck"), KeyboardInterrupt()])
def test_an_error_behind_the_forward(llama: Tiny, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """What its rows said is lost: the step's requests fail, one that still waits is answered."""
    engine = make_engine(llama, committee(llama, 5), max_num_seqs=10)
    requests = [
        Request(
            (token_ids(llama, 30, seed), token_ids(llama, 4, 2)),
            aggregate=aggregate,
            sampling=SamplingParams(max_tokens=6, temperature=1.0, seed=seed),
        )
        for seed, aggregate in enumerate(("vote", "mixture", "vote"))
    ]
    want = engine.ask(*[requests[2].question], sampling=requests[2].sampling).experts
    ids = [engine.submit(request) for request in requests]
    assert [event.request_id for event in engine.step() if isinstance(event, Routed)] == ids[:2]

    def breaks(*args: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("whispers_engine.scheduler.sample", breaks)
        with pytest.raises(type(error)):
            engine.step()
    stats = engine.cache_stats()
    assert engine.pool.available == stats["pages_free"] == stats["pages_total"] - stats["pages_pinned"]
    events = engine.step()
    assert [event.request_id for event in events if isinstance(event, Failed)] == ids[:2]
    assert all(type(error).__name__ in event.error for event in events if isinstance(event, Failed))
    while engine.busy:
        events += engine.step()
    (answer,) = [event.answer for event in events if isinstance(event, Done)]
    assert [record.tokens for record in answer.experts] == [record.tokens for record in want]
    check_all_back(engine)
    last = engine.submit(requests[0])
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr("whispers_engine.scheduler.sample", breaks)
        while engine.busy:
            engine.step()
    assert engine.busy and [event.request_id for event in engine.step() if isinstance(event, Failed)] == [last]
    assert not engine.busy


def test_a_stream_collected_in_the_middle_of_a_step(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector runs when it likes: the task ends with the step, and the others go on."""
    engine = make_engine(llama, committee(llama, 5))
    questions = [(token_ids(llama, 30, seed), token_ids(llama, 4, 2)) for seed in range(2)]
    want = engine.ask(questions[1], sampling=SamplingParams(max_tokens=4))
    streams = [engine.stream(questions[0], sampling=SamplingParams(max_tokens=2))]
    next(streams[0])
    engine.submit(Request(questions[1], sampling=SamplingParams(max_tokens=4)))
    likeliest = engine.model.likeliest

    def collect(*args: object) -> object:
        streams.clear()
        return likeliest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.model, "likeliest", collect)
    events = engine.step()
    assert not streams
    while engine.busy:
        events += engine.step()
    (answer,) = [event.answer for event in events if isinstance(event, Done)]
    assert [record.tokens for record in answer.experts] == [record.tokens for record in want.experts]
    check_all_back(engine)


def test_a_failing_pin_leaves_nothing(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llama, [])

    def breaks(*args: object) -> torch.Tensor:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.model, "forward", breaks)
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.add_expert(soft_prompt(llama, 9, 1, "one", "detached"))
    assert engine.experts == []
    assert engine.cache_stats()["pages_free"] == engine.cache_stats()["pages_total"]


def test_submitted_requests_can_be_dropped(llama: Tiny) -> None:
    engine = make_engine(llama, committee(llama, 5))
    ids = [engine.submit(Request((token_ids(llama, 30, seed), token_ids(llama, 4, 2)))) for seed in range(4)]
    engine.step()
    for request_id in ids:
        engine.abort(request_id)
        engine.abort(request_id)
    check_all_back(engine)
    assert engine.step() == []
    request_id = engine.submit(Request((token_ids(llama, 30, 1), token_ids(llama, 4, 2))))
    next(engine.stream((token_ids(llama, 30, 2), token_ids(llama, 4, 2))))  # its step runs the other request too
    engine.abort(request_id)
    assert engine.step() == []  # none of what happened to it


# --- in any company --------------------------------------------------------------------------------------------------------------

OPTIONS = [[5], [6, 7, 8], [9, 10]]


def test_alone_in_a_committee_and_beside_others(llama: Tiny) -> None:
    experts = committee(llama, 20)
    engine = make_engine(llama, experts)
    question = (token_ids(llama, 45, 1), token_ids(llama, 4, 2))
    together = engine.score(question, OPTIONS)
    assert together.experts == [expert.name for expert in experts]
    for index in range(0, 20, 3):
        alone = make_engine(llama, [experts[index]]).score(question, OPTIONS)
        torch.testing.assert_close(together.logprobs[index], alone.logprobs[0], atol=1e-4, rtol=0)

    busy = make_engine(llama, experts, max_num_batched_tokens=64, max_num_seqs=64)
    for seed in range(2):
        # One shares the question's first pages while both run, one nothing.
        ids = [*question[0][:20], *token_ids(llama, 13, seed)] if seed else token_ids(llama, 33, seed)
        busy.submit(Request((ids, token_ids(llama, 3, seed)), sampling=SamplingParams(max_tokens=40)))
    for _ in range(4):
        busy.step()
    assert busy.busy
    beside = busy.score(question, OPTIONS)
    torch.testing.assert_close(beside.logprobs, together.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 8, 17, 40])
def test_chunks_of_any_size(llama: Tiny, chunk: int) -> None:
    experts = committee(llama, 5)
    question = (token_ids(llama, 45, 1), token_ids(llama, 4, 2))
    want = make_engine(llama, experts).score(question, OPTIONS)
    got = make_engine(llama, experts, max_num_batched_tokens=chunk, max_num_seqs=8).score(question, OPTIONS)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_pages_of_any_size(llama: Tiny, page_size: int) -> None:
    experts = committee(llama, 5)
    question = (token_ids(llama, 45, 1), token_ids(llama, 4, 2))
    want = make_engine(llama, experts).score(question, OPTIONS)
    got = make_engine(llama, experts, page_size=page_size).score(question, OPTIONS)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-4, rtol=0)


def test_requests_in_one_batch_share_their_system_prompt(llama: Tiny) -> None:
    """Two requests with the same first pages: the plan names those pages once, and both see them."""
    experts = committee(llama, 5)
    engine = make_engine(llama, experts)
    system, header = token_ids(llama, 32, 1), token_ids(llama, 4, 2)
    questions = [([*system, *token_ids(llama, 9 + seed, seed)], header) for seed in range(3)]
    engine.score(([*system, 3], header), [[5]])  # warms the pages
    want = [make_engine(llama, experts).ask(question, sampling=SamplingParams(max_tokens=6)) for question in questions]
    for question in questions:
        engine.submit(Request(question, sampling=SamplingParams(max_tokens=6)))
    seen: list[int] = []
    forward = engine.model.forward

    def count(batch, pool, taps=None):  # type: ignore[no-untyped-def]
        named = batch.plan.pages[: batch.plan.page_ptr[-1]].tolist()
        seen.append(max(named.count(page) for page in named))
        return forward(batch, pool, taps)

    engine.model.forward = count  # type: ignore[method-assign]
    answers = {}
    while engine.busy:
        for event in engine.step():
            assert not isinstance(event, Failed)
            if isinstance(event, Done):
                answers[event.request_id] = event.answer
    # Pinned pages are named once a branch that sees them; three requests, so three times; context pages never twice.
    assert max(seen) <= len(questions)
    for got, expected in zip((answers[key] for key in sorted(answers)), want, strict=True):
        assert [record.tokens for record in got.experts] == [record.tokens for record in expected.experts]
        assert got.usage["context_tokens_cached"] == 3 * 32


def test_requests_wait_for_room(llama: Tiny) -> None:
    """More requests than pages and branches allow at once: all are answered, in order of their start."""
    engine = make_engine(llama, committee(llama, 5), kv_cache_tokens=100 * PAGE, max_num_seqs=10)
    questions = [(token_ids(llama, 30, seed), token_ids(llama, 4, 2)) for seed in range(6)]
    for question in questions:
        engine.submit(Request(question, sampling=SamplingParams(max_tokens=8)))
    events = []
    while engine.busy:
        events += engine.step()
    assert [event.request_id for event in events if isinstance(event, Routed)] == list(range(6))
    answers = {event.request_id: event.answer for event in events if isinstance(event, Done)}
    for index, question in enumerate(questions):
        alone = make_engine(llama, committee(llama, 5)).ask(question, sampling=SamplingParams(max_tokens=8))
        assert [record.tokens for record in answers[index].experts] == [record.tokens for record in alone.experts]
    check_all_back(engine)


def test_a_waiting_request_that_can_never_run_fails(llama: Tiny) -> None:
    """Accepted, then experts were pinned into the room it needed."""
    engine = make_engine(llama, [], kv_cache_tokens=8 * PAGE)
    request_id = engine.submit(Request((token_ids(llama, 30, 1), [5]), sampling=SamplingParams(max_tokens=20)))
    engine.add_expert(soft_prompt(llama, 30, 1, "one", "detached"))
    (event,) = engine.step()
    assert isinstance(event, Failed)
    assert event.request_id == request_id
    assert "too small" in event.error
    with pytest.raises(WhispersError, match="too small"):
        engine.ask((token_ids(llama, 30, 1), [5]), experts=[], sampling=SamplingParams(max_tokens=20))
    request_id = engine.submit(Request(token_ids(llama, 9, 1), experts=["one"], sampling=SamplingParams(max_tokens=1)))
    engine.add_expert(soft_prompt(llama, 20, 2, "two", "detached"))
    (event,) = engine.step()
    assert isinstance(event, Failed) and event.request_id == request_id
    for name in engine.experts:  # the one that it asked is pinned by nobody any more
        engine.remove_expert(name)
    assert engine.cache_stats()["pages_free"] == engine.cache_stats()["pages_total"]
