"""Decode steps whose plan stays on the device give the answers that any other step gives, and hardly ever need a new plan.

A CPU has no graphs to capture, and its engines no decoder: one is planted, which runs the same step kernel by kernel. The reference sums in
another order where rows are padded to a decoder's capacity, so log-probabilities agree to 1e-4 a token; tokens, texts and votes are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.engine.conftest import Tiny, kv_prompt, soft_prompt, token_ids
from tests.engine.test_sharing import check_all_back, committee
from tests.kernels.impls import device_of
from tests.kernels.plans import schedule_constants
from whispers_engine import Done, Engine, Expert, Finished, Request, SamplingParams, Token
from whispers_engine import decode as decode_module
from whispers_engine import model as model_module
from whispers_engine.batch import Span, Work
from whispers_engine.bench.llama import SHAPES, random_weights
from whispers_engine.bench.steps import Prompt, Rig
from whispers_engine.decode import Decoder
from whispers_engine.request import Event
from whispers_engine.scheduler import Computed
from whispers_kernels import available_impls

PAGE = 8
TOLERANCE = 1e-4  # of a token's log-probability
needs_triton = pytest.mark.skipif("triton" not in available_impls(), reason="needs triton")
# The interpreter computes with numpy, which warns of the infinities that a kernel makes and handles.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Watched(Decoder):
    """A decoder without graphs that counts what it does."""

    def __init__(self, engine: Engine):
        super().__init__(engine.model, engine.pool, capture=False)
        self.steps: list[list[Span]] = []  # the spans of every step that it ran
        self.others = 0  # steps that it left to others
        self.loads = 0

    def run(self, work: list[Work]) -> tuple[Tensor, dict[Span, int]] | None:
        found = super().run(work)
        if found is None:
            self.others += 1
        else:
            self.steps.append([span for span, _ in work])
            assert all(len(span.pages) <= self._pool.pages_for(span.room) for span, _ in work)
        return found

    def _load(self, work: list[Work]) -> Any:
        self.loads += 1
        return super()._load(work)

    @property
    def changes(self) -> int:
        """How often a step was of other branches than the step before it, the first step included."""
        return sum(now != before for before, now in zip([[], *self.steps], self.steps, strict=False))


def make(tiny: Tiny, experts: Sequence[Expert], **settings: Any) -> Engine:
    """A CPU's engine over a pool of NaN: a key that is read before it is written shows."""
    wanted = {"device": "cpu", "impl": "reference", "page_size": PAGE, "kv_cache_tokens": 16384, **settings}
    engine = Engine(tiny.folder, **wanted)
    for store in (engine.pool.k, engine.pool.v):
        store.fill_(torch.nan)
    for expert in experts:
        engine.add_expert(expert)
    return engine


def plant(engine: Engine) -> Watched:
    decoder = Watched(engine)
    engine._scheduler.decoder = decoder
    return decoder


def pair(tiny: Tiny, experts: Sequence[Expert], **settings: Any) -> tuple[Engine, Engine, Watched]:
    """An engine, and one with a decoder planted."""
    plain, fast = (make(tiny, experts, **settings) for _ in range(2))
    return plain, fast, plant(fast)


def endless(*engines: Engine) -> None:
    """No token ends an answer, so that its length is known."""
    for engine in engines:
        engine.model.config = replace(engine.model.config, eos_ids=())


def told(event: Event) -> tuple[Any, list[float]]:
    """What of an event is to be equal, and what is to be close: log-probabilities for one token each, and options' probabilities."""
    if isinstance(event, Token):
        return replace(event, logprob=0.0), [event.logprob]
    records = [event.answer] if isinstance(event, Finished) else event.answer.experts if isinstance(event, Done) else []
    plain = [replace(record, logprob=0.0) for record in records]
    logprobs = [record.logprob / max(1, len(record.tokens)) for record in records]
    if isinstance(event, Done):
        options = event.answer.options
        answer = replace(event.answer, experts=plain, options=None if options is None else [], timing={})
        return replace(event, answer=answer), logprobs + (options or [])
    return (plain if isinstance(event, Finished) else event), logprobs


def same(got: Sequence[Event], want: Sequence[Event], tolerance: float = TOLERANCE) -> None:
    """Event for event: all equal but log-probabilities, which are within the tolerance a token, and times."""
    assert [told(event)[0] for event in got] == [told(event)[0] for event in want]
    for mine, theirs in zip(got, want, strict=True):
        assert told(mine)[1] == pytest.approx(told(theirs)[1], rel=0, abs=tolerance)


def tokens(events: Sequence[Event]) -> int:
    """How many tokens were handed out."""
    return sum(isinstance(event, Token) for event in events)


def written(engine: Engine) -> int:
    """Numbers in the pool that were ever written."""
    return sum(int((~store.isnan()).sum()) for store in (engine.pool.k, engine.pool.v))


# --- the same answers --------------------------------------------------------------------------------------------------------------

SAMPLINGS = [
    SamplingParams(max_tokens=40),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.95, seed=5, max_tokens=40, stop=("e",)),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_answers_are_the_same(tiny: Tiny, sampling: SamplingParams) -> None:
    """All families, placements and kinds, over several pages; five branches take a capacity of eight rows."""
    plain, fast, decoder = pair(tiny, committee(tiny, 5))
    before = fast.cache_stats()
    question = (token_ids(tiny, 21, 1), token_ids(tiny, 4, 2))
    want, got = (list(engine.stream(question, sampling=sampling, early_end=False)) for engine in (plain, fast))
    same(got, want)
    assert len(decoder.steps) > 5 and decoder.others == 1  # contexts, and what stands before the first tokens
    assert decoder.loads == decoder.changes
    check_all_back(fast)
    assert {**fast.cache_stats(), "pages_kept": 0} == before


@pytest.mark.parametrize("aggregate", ["vote", "mixture", "product", "delegate", "compose"])
def test_every_rule(llama: Tiny, aggregate: str) -> None:
    """With votes that end early, and the base's own answer to what the experts said."""
    plain, fast, decoder = pair(llama, committee(llama, 5))
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=12, stop=("e", "t"))
    weights = {"e0": 5.0, "e1": 1.0, "e2": 1.5, "e3": 2.0, "e4": 0.5}
    for seed in range(3):
        question = f"what do people eat {seed}"
        how = {"experts": weights, "aggregate": aggregate, "sampling": replace(sampling, seed=seed)}
        want, got = (list(engine.stream(question, **how)) for engine in (plain, fast))  # type: ignore[arg-type]
        same(got, want)
        check_all_back(fast)
    assert decoder.steps


def test_branches_that_end_at_different_times(llama: Tiny) -> None:
    """Their rows leave, the others move up, pages stay where they are; one plan for as long as the same ones run."""
    plain, fast, decoder = pair(llama, committee(llama, 7))
    sampling = SamplingParams(temperature=1.5, seed=8, max_tokens=60, stop=("a", "o", "s", "i", "n"))
    question = (token_ids(llama, 30, 1), token_ids(llama, 4, 2))
    want, got = (list(engine.stream(question, sampling=sampling, early_end=False)) for engine in (plain, fast))
    same(got, want)
    assert len({len(step) for step in decoder.steps}) > 3
    assert decoder.loads == decoder.changes < len(decoder.steps)
    check_all_back(fast)


# --- requests that come and go -----------------------------------------------------------------------------------------------------


def requests(tiny: Tiny) -> list[Request]:
    """Two share their contexts' first pages; rules and samplings differ; one is scored options, which no decoder runs."""
    shared, header = token_ids(tiny, 24, 1), token_ids(tiny, 4, 2)
    hot = SamplingParams(temperature=1.2, seed=6, max_tokens=14)
    return [
        Request(([*shared, *token_ids(tiny, 7, 3)], header), sampling=SamplingParams(max_tokens=45)),
        Request(([*shared, *token_ids(tiny, 12, 4)], header), aggregate="mixture", sampling=hot),
        Request((token_ids(tiny, 9, 5), header[:1]), experts=["e2", "e0"], sampling=SamplingParams(max_tokens=30)),
        Request((token_ids(tiny, 40, 6), header), experts=[], aggregate="product", sampling=replace(hot, max_tokens=9)),
        Request((token_ids(tiny, 15, 7), header), [[5], [6, 7, 8]]),
        Request(([*shared, *token_ids(tiny, 7, 3)], header), experts=["e1"], sampling=SamplingParams(max_tokens=11)),
    ]


def follow(
    engine: Engine, asked: Sequence[Request], look: Callable[[Engine], None] = lambda engine: None
) -> list[Event]:
    """One more request every seventh step, the first one aborted on its way; all events in their order."""
    events: list[Event] = []
    waiting, ids = list(asked), []
    step = 0
    while waiting or engine.busy:
        if waiting and step % 7 == 0:
            ids.append(engine.submit(waiting.pop(0)))
        if step == 24:
            engine.abort(ids[0])
        events += engine.step()
        look(engine)
        step += 1
    return events


@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_requests_join_and_leave(llama: Tiny, page_size: int) -> None:
    """A step that a newcomer's context shares is not the decoder's, and the next one is again."""
    plain, fast, decoder = pair(llama, committee(llama, 5), page_size=page_size)
    room: dict[Engine, list[int]] = {plain: [], fast: []}  # what a newcomer could reserve, step by step

    def look(engine: Engine) -> None:
        room[engine].append(engine.pool.available)

    want, got = (follow(engine, requests(llama), look) for engine in (plain, fast))
    same(got, want)
    assert sum(isinstance(event, Done) for event in got) == 5
    # Pages taken ahead are those that were reserved anyway; once a branch ends they are free the sooner.
    assert all(mine >= theirs for mine, theirs in zip(room[fast], room[plain], strict=True))
    assert len(decoder.steps) > 30 and decoder.others == 6
    assert decoder.loads <= decoder.changes + decoder.others
    check_all_back(fast)


def test_a_pool_of_exactly_the_pages_that_are_reserved(llama: Tiny) -> None:
    """Pages are taken ahead of need, never more than the request can take at most."""
    experts = [soft_prompt(llama, 5, 1, "one", "suffix"), soft_prompt(llama, 6, 2, "two", "suffix")]
    question = (token_ids(llama, 20, 1), token_ids(llama, 4, 2))
    sampling = SamplingParams(max_tokens=30)
    # Three pages of context; 5 + 4 + 29 and 6 + 4 + 29 positions of the branches' own.
    plain, fast, decoder = pair(llama, experts, kv_cache_tokens=(3 + 5 + 5) * PAGE)
    endless(plain, fast)
    for _ in range(2):
        want, got = (list(engine.stream(question, sampling=sampling)) for engine in (plain, fast))
        same(got, want)
        assert tokens(got) == 60
        check_all_back(fast)
    assert len(decoder.steps) == 2 * 29 and decoder.loads == 2


# --- long answers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page_size", "context"), [(8, 10), (64, 200)])
def test_one_plan_for_a_range_of_positions(llama: Tiny, page_size: int, context: int) -> None:
    """An answer over the boundary at 256, to the longest position that the base has: two plans in all."""
    plain, fast, decoder = pair(llama, [], page_size=page_size)
    endless(plain, fast)
    question, length = (token_ids(llama, context, 1), token_ids(llama, 2, 2)), 512 - context - 2
    sampling = SamplingParams(temperature=0.8, seed=1, max_tokens=512)
    want, got = (list(engine.stream(question, sampling=sampling)) for engine in (plain, fast))
    same(got, want)
    assert tokens(got) == length and len(decoder.steps) == length - 1
    assert decoder.loads == 2
    check_all_back(fast)


def test_a_committees_long_answers(llama: Tiny) -> None:
    """Soft prompts of different lengths cross the boundary at different steps: a plan for each of them at most."""
    plain, fast, decoder = pair(llama, committee(llama, 5))
    endless(plain, fast)
    question = (token_ids(llama, 230, 1), token_ids(llama, 4, 2))
    sampling = SamplingParams(temperature=0.8, seed=1, max_tokens=60)
    want, got = (list(engine.stream(question, sampling=sampling, early_end=False)) for engine in (plain, fast))
    same(got, want)
    assert tokens(got) == 5 * 60 and len(decoder.steps) == 59
    assert 2 <= decoder.loads <= 1 + 5
    assert written(fast) == written(plain)  # rows that are not there store nothing
    check_all_back(fast)


# --- what a decoder leaves alone -----------------------------------------------------------------------------------------------------


def test_soft_prompts_contexts_and_options_are_not_its_steps(llama: Tiny) -> None:
    engine = make(llama, [])
    decoder = plant(engine)
    for expert in [*committee(llama, 5), soft_prompt(llama, 1, 1, "short", "detached")]:
        engine.add_expert(expert)
    question = (token_ids(llama, 1, 1), token_ids(llama, 1, 2))  # a single row each
    engine.score(question, [[5], [6, 7]])
    engine.ask(question, sampling=SamplingParams(max_tokens=1))
    assert decoder.others > 0 and decoder.steps == [] and decoder.loads == 0
    check_all_back(engine)


def test_more_branches_than_it_has_rows_for(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other step computes them, until enough of them have ended."""
    monkeypatch.setattr(decode_module, "ROWS", (1, 2))
    plain, fast, decoder = pair(llama, committee(llama, 5))
    sampling = SamplingParams(temperature=1.5, seed=8, max_tokens=60, stop=("a", "o", "s", "i", "n"))
    question = (token_ids(llama, 30, 1), token_ids(llama, 4, 2))
    want, got = (list(engine.stream(question, sampling=sampling, early_end=False)) for engine in (plain, fast))
    same(got, want)
    assert decoder.others > 2 and decoder.steps and max(map(len, decoder.steps)) <= 2
    check_all_back(fast)


def test_more_pages_than_a_plan_names(llama: Tiny) -> None:
    """Two long contexts in pages of one position are too many for two rows; for the one that stays they are not."""
    plain, fast, decoder = pair(llama, [], page_size=1)
    endless(plain, fast)
    asked = [
        Request((token_ids(llama, 400, seed), [5]), sampling=SamplingParams(max_tokens=length))
        for seed, length in ((1, 5), (2, 12))
    ]
    want, got = (follow(engine, asked[::-1]) for engine in (plain, fast))
    same(got, want)
    assert decoder.loads > decoder.others - 3 > 0 and decoder.steps
    check_all_back(fast)


def test_a_step_for_a_part_of_the_branches(llama: Tiny) -> None:
    """With fewer rows a step than branches, each has its turn; a pool waits for all of them."""
    plain, fast, decoder = pair(llama, committee(llama, 5), max_num_batched_tokens=2, max_num_seqs=8)
    question = (token_ids(llama, 9, 1), token_ids(llama, 2, 2))
    for aggregate in ("vote", "mixture"):
        how = {"aggregate": aggregate, "sampling": SamplingParams(max_tokens=7)}
        want, got = (list(engine.stream(question, **how)) for engine in (plain, fast))  # type: ignore[arg-type]
        same(got, want)
        check_all_back(fast)
    assert decoder.steps


# --- what goes wrong -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", ["vote", "mixture"])
def test_a_stream_abandoned_at_any_time(llama: Tiny, aggregate: str) -> None:
    engine = make(llama, committee(llama, 5))
    decoder = plant(engine)
    question = (token_ids(llama, 30, 1), token_ids(llama, 4, 2))
    how = {"aggregate": aggregate, "sampling": SamplingParams(max_tokens=12), "early_end": False}
    total = sum(1 for _ in engine.stream(question, **how))  # type: ignore[arg-type]
    for stop in range(1, total, 5):
        events = engine.stream(question, **how)  # type: ignore[arg-type]
        for _ in range(stop):
            next(events)
        events.close()  # type: ignore[attr-defined]
        check_all_back(engine)
    assert decoder.steps


def test_an_error_on_the_way(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages come back, and the plan that was under way is of no harm to the next answer."""
    plain, fast, decoder = pair(llama, committee(llama, 5))
    question, sampling = (token_ids(llama, 30, 1), token_ids(llama, 4, 2)), SamplingParams(max_tokens=12)
    want = list(plain.stream(question, sampling=sampling))
    forward, calls = fast.model.forward, []

    def breaks(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 7:
            raise RuntimeError("out of luck")
        return forward(*args)

    monkeypatch.setattr(fast.model, "forward", breaks)
    with pytest.raises(RuntimeError, match="out of luck"):
        fast.ask(question, sampling=sampling)
    assert len(decoder.steps) == 5
    check_all_back(fast)
    again = cast(Done, list(fast.stream(question, sampling=sampling))[-1])
    wanted = cast(Done, want[-1])
    assert [record.tokens for record in again.answer.experts] == [record.tokens for record in wanted.answer.experts]
    check_all_back(fast)


# --- the bench's rig -------------------------------------------------------------------------------------------------------------------


def test_the_rig_with_a_decoder() -> None:
    """As it has one on a GPU: the same tokens, answer after answer, each with one plan."""
    shape, new_tokens = SHAPES["tiny"], 20
    weights = random_weights(shape, torch.float32, torch.device("cpu"))
    prompt = Prompt.random(shape, weights, 3, 50)
    plain, fast = (Rig(shape, weights, prompt, new_tokens) for _ in range(2))
    decoder = Watched(cast(Engine, fast._scheduler))  # it has the model and the pool that a decoder wants
    fast._scheduler.decoder = decoder
    for count, size in enumerate((1, 3, 3), 1):
        want, got = (rig.decode(size, new_tokens) for rig in (plain, fast))
        assert got.tokens == want.tokens and len(got.step_ms) == new_tokens - 1
        for mine, theirs in zip(got.logprobs, want.logprobs, strict=True):
            assert mine == pytest.approx(theirs, rel=0, abs=TOLERANCE)
        assert decoder.loads == count and len(decoder.steps) == count * (new_tokens - 1)


# --- the kernels -----------------------------------------------------------------------------------------------------------------------


def with_triton(tiny: Tiny, experts: Sequence[Expert], page_size: int) -> Engine:
    """On a GPU where there is one; without, every step is interpreted, and soft prompts in front take the reference."""
    engine = make(tiny, [], device=device_of("triton").type, impl="triton", page_size=page_size, enforce_eager=True)
    engine.model.impl = "reference"
    for expert in experts:
        engine.add_expert(expert)
    engine.model.impl = "triton"
    return engine


def run(engine: Engine, request: Request) -> list[Event]:
    """All of a request's events. The reference fills the pages up to the first token: an interpreted prefill takes minutes."""
    impl, events = engine.model.impl, []
    engine.submit(request)
    engine.model.impl = "reference"
    while not tokens(events):
        events += engine.step()
    engine.model.impl = impl
    while engine.busy:
        events += engine.step()
    return events


@needs_triton
def test_kernels_give_the_references_answer_and_a_decoder_the_same_bits(llama: Tiny) -> None:
    """Placements and kinds in four rows, as many as a capacity has. Three branches go on to another range of keys, one to another page."""
    experts = [
        soft_prompt(llama, 14, 1, "suffix", "suffix"),
        soft_prompt(llama, 3, 2, "detached", "detached"),
        soft_prompt(llama, 4, 3, "prefix", "prefix"),
        kv_prompt(llama, 2, 4, "kv", "detached"),
    ]
    question = (token_ids(llama, 20, 1), token_ids(llama, 29, 2))
    request = Request(question, sampling=SamplingParams(max_tokens=7), early_end=False)
    # Ranges as short as a tile of float32 keys may be: an interpreted step over the hundreds of keys of longer ones lasts ten seconds.
    with schedule_constants({"RANGE": 32, "ALIGN": 32}):
        plain, fast = (with_triton(llama, experts, page_size=16) for _ in range(2))
        want = make(llama, experts, page_size=16)
        decoder = plant(fast)
        endless(plain, fast, want)
        expected, found, planned = (run(engine, request) for engine in (want, plain, fast))
    same(found, expected)
    same(planned, found, tolerance=0.0)
    assert tokens(found) == 4 * 7 and len(decoder.steps) == 6
    assert decoder.loads == 2  # the second for the suffix branch's position 48, which is in a page of another range
    check_all_back(fast)


def one_row_at_a_time(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose bits cannot depend on how many rows there are, as those of a matrix library may."""
    return torch.cat([torch.nn.functional.linear(row, weight, bias) for row in x.split(1)])


@needs_triton
def test_a_rows_bits_are_its_own_in_any_company(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone a context is one segment; beside another one that begins with the same pages it is cut where a range of keys ends."""
    monkeypatch.setattr(model_module, "F", SimpleNamespace(linear=one_row_at_a_time))
    experts = [soft_prompt(llama, 2, 1, "suffix", "suffix"), soft_prompt(llama, 3, 2, "detached", "detached")]
    engine = with_triton(llama, experts, page_size=64)
    shared, header, options = token_ids(llama, 320, 1), token_ids(llama, 2, 2), [[5], [6, 7]]
    engine.model.impl = "reference"  # interpreted, the pages to share alone would take minutes
    engine.score(([*shared, 4], header), [[5]])
    engine.model.impl = "triton"
    plans: list[list[tuple[int, ...]]] = []  # length, row_begin and row_end of every segment
    hidden: list[dict[tuple[int, ...], Tensor]] = []  # of every span's rows
    forward, compute = engine.model.forward, engine._scheduler.compute

    def look(batch: Any, pool: Any, taps: Any) -> Tensor:
        columns = batch.plan.columns
        plans.append([*zip(*(c.tolist() for c in (columns.length, columns.row_begin, columns.row_end)), strict=True)])
        return forward(batch, pool, taps)

    def keep(work: list[Work], taps: Any) -> Computed:
        found = compute(work, taps)
        ends = {span: found.last[span] + 1 for span, _ in work}
        hidden.append({(span.begin, *span.ids): found.hidden[ends[span] - count : ends[span]] for span, count in work})
        return found

    monkeypatch.setattr(Span, "wanted", lambda _, rows: rows)
    monkeypatch.setattr(engine.model, "forward", look)
    monkeypatch.setattr(engine._scheduler, "compute", keep)
    mine = ([*shared, 8, 9], header)
    alone = engine.score(mine, options)
    other = engine.submit(Request(([*shared, 9], header), options, experts=["suffix"]))
    beside = engine.score(mine, options)
    assert [event.request_id for event in engine.step() if isinstance(event, Done)] == [other]
    (first, second), (mine_alone, all_together) = plans, hidden
    rows = max(row_end for _, _, row_end in second)
    assert rows > max(row_end for _, _, row_end in first)
    assert 322 in {length for length, *_ in first} and (256, 0, rows) in second and (256, 0, rows) not in first
    assert len(all_together) > len(mine_alone) == 1 + 2 * (1 + 1)  # a context, two branches, the longer option of each
    for span, values in mine_alone.items():
        assert torch.equal(values, all_together[span])
    # The sum over the vocabulary is PyTorch's; on a GPU its order depends on how many rows there are.
    tolerance = 0.0 if engine.model.device.type == "cpu" else 1e-5
    torch.testing.assert_close(alone.logprobs, beside.logprobs, atol=tolerance, rtol=0)
    reference = make(llama, experts, page_size=64).score(mine, options)
    torch.testing.assert_close(alone.logprobs, reference.logprobs, atol=len(options) * TOLERANCE, rtol=0)
    check_all_back(engine)
