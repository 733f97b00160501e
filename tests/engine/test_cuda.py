"""The engine on a GPU: the CPU's answers, the same bits with CUDA graphs as without, and one wait a step. Skipped where there is no GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.conftest import Tiny, soft_prompt, token_ids
from tests.engine.test_decode import PAGE, Watched, endless, follow, requests, same, tokens
from tests.engine.test_sharing import check_all_back, committee
from whispers_engine import Engine, Expert, Request, SamplingParams
from whispers_engine.bench.llama import SHAPES, random_weights
from whispers_engine.bench.steps import Prompt, Rig
from whispers_engine.decode import Decoder
from whispers_engine.engine import _pool_pages
from whispers_engine.request import Event

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
TOLERANCE = 1e-3  # of a token's log-probability in float32: other kernels, other orders of summation
SAMPLINGS = [
    SamplingParams(max_tokens=24),
    SamplingParams(temperature=1.2, top_k=40, top_p=0.95, seed=5, max_tokens=24),
]


def make(tiny: Tiny, experts: Sequence[Expert], **settings: Any) -> Engine:
    """On the GPU, with a pool that leaves room for other engines."""
    same_for_all = {"device": DEVICE, "dtype": "float32", "kv_cache_tokens": 16384, "max_num_batched_tokens": 2048}
    engine = Engine(tiny.folder, **{**same_for_all, **settings})
    for expert in experts:
        engine.add_expert(expert)
    return engine


def on_cpu(tiny: Tiny, experts: Sequence[Expert], **settings: Any) -> Engine:
    return make(tiny, experts, device="cpu", impl="reference", **settings)


def captured(engine: Engine) -> int:
    """How many graphs an engine has captured."""
    decoder = engine._scheduler.decoder
    assert decoder is not None and decoder._capture
    return sum(step.graph is not None for step in decoder._steps.values())


# --- the CPU's answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [PAGE, 64])
def test_answers_equal_the_cpus(tiny: Tiny, page_size: int) -> None:
    """All families, placements and kinds; five branches take a graph of eight rows."""
    experts = committee(tiny, 5)
    want, got = (kind(tiny, experts, page_size=page_size) for kind in (on_cpu, make))
    question = (token_ids(tiny, 250, 1), token_ids(tiny, 4, 2))  # the answers go on into another range of keys
    for sampling in SAMPLINGS:
        streams = [list(e.stream(question, sampling=sampling, early_end=False)) for e in (got, want)]
        same(*streams, tolerance=TOLERANCE)
        check_all_back(got)
    assert captured(got) > 0
    options = [[5], [6, 7, 8], [9, 10]]
    scored, expected = (engine.score(question, options) for engine in (got, want))
    torch.testing.assert_close(scored.logprobs, expected.logprobs, atol=3 * TOLERANCE, rtol=0)


@pytest.mark.parametrize("aggregate", ["vote", "mixture", "product", "compose"])
def test_every_rule(llama: Tiny, aggregate: str) -> None:
    want, got = (kind(llama, committee(llama, 5), page_size=PAGE) for kind in (on_cpu, make))
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=12, stop=("e", "t"))
    how: dict[str, Any] = {"aggregate": aggregate, "sampling": sampling}
    same(*(list(e.stream("what do people eat", **how)) for e in (got, want)), tolerance=TOLERANCE)
    check_all_back(got)


def test_a_graph_keeps_to_its_own_memory() -> None:
    """Others may clear cuBLAS's workspaces, as torch.compile does: what is handed out next must not be one that a graph writes to.

    An 8B model's products are split over their long sums, and so have a workspace.
    """
    shape, device = SHAPES["llama-8b"].shallow(), torch.device(DEVICE)
    weights = random_weights(shape, torch.bfloat16, device)
    rig = Rig(shape, weights, Prompt.random(shape, weights, 8, 300), 8, "triton")
    before = rig.decode(8, 8).tokens
    decoder = rig._scheduler.decoder
    assert decoder is not None
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.stream(decoder._side):  # memory goes back to the stream that it was taken for
        others = torch.full((32 << 20,), 77, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    assert rig.decode(8, 8).tokens == before
    torch.cuda.synchronize()
    assert bool((others == 77).all())


def test_requests_join_and_leave(llama: Tiny) -> None:
    """Graphs are captured while others run, and used again."""
    want, got = (kind(llama, committee(llama, 5), page_size=PAGE) for kind in (on_cpu, make))
    expected = follow(want, requests(llama))
    for round_ in range(2):
        events = follow(got, requests(llama))
        if round_ == 0:
            same(events, expected, tolerance=TOLERANCE)
            graphs = captured(got)
        else:
            assert tokens(events) == tokens(expected)
        check_all_back(got)
    assert graphs == captured(got) > 0


def test_a_stream_abandoned_on_its_way(llama: Tiny) -> None:
    engine = make(llama, committee(llama, 5))
    question = (token_ids(llama, 30, 1), token_ids(llama, 4, 2))
    for stop in (2, 9, 17, 40):
        events = engine.stream(question, sampling=SamplingParams(max_tokens=12), early_end=False)
        for _ in range(stop):
            next(events)
        events.close()  # type: ignore[attr-defined]
        check_all_back(engine)


# --- graphs ------------------------------------------------------------------------------------------------------------------------


def bits(engine: Engine, question: tuple[list[int], list[int]]) -> list[list[Event]]:
    """Streams of answers that all last the same number of steps, so that every step has as many rows as its graph."""
    endless(engine)
    found = [
        list(engine.stream(question, sampling=sampling, early_end=False, aggregate=aggregate))
        for sampling in SAMPLINGS
        for aggregate in ("vote", "mixture")
    ]
    check_all_back(engine)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_and_eager_steps_agree_bit_for_bit(tiny: Tiny, dtype: str) -> None:
    """Four rows, as many as the graph has: a matrix library may sum in another order for another number of them."""
    experts = [expert for expert in committee(tiny, 5) if expert.name != "e3"]
    question = (token_ids(tiny, 240, 1), token_ids(tiny, 4, 2))
    graphs, eager = (make(tiny, experts, dtype=dtype, enforce_eager=enforce) for enforce in (False, True))
    assert eager._scheduler.decoder is None
    for mine, theirs in zip(bits(graphs, question), bits(eager, question), strict=True):
        same(mine, theirs, tolerance=0.0)
    assert captured(graphs) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_is_the_step_that_it_was_captured_from(llama: Tiny, dtype: str) -> None:
    """Bit for bit with rows that are not there too: beside a decoder that runs the same step kernel by kernel."""
    graphs, kernels = (make(llama, committee(llama, 5), dtype=dtype, page_size=PAGE) for _ in range(2))
    watched = Watched(kernels)
    kernels._scheduler.decoder = watched
    question = (token_ids(llama, 240, 1), token_ids(llama, 4, 2))
    for sampling in SAMPLINGS:
        streams = [list(e.stream(question, sampling=sampling, early_end=False)) for e in (graphs, kernels)]
        same(*streams, tolerance=0.0)
    same(follow(graphs, requests(llama)), follow(kernels, requests(llama)), tolerance=0.0)
    assert captured(graphs) > 0 and watched.steps


def waits(act: Callable[[], Any]) -> int:
    """How often the host waits for the device meanwhile."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("aggregate", ["vote", "product"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_a_step_waits_once(llama: Tiny, sampling: SamplingParams, aggregate: str) -> None:
    """For the tokens that it hands out; so does one that lays out another plan, since somebody has left."""
    one = torch.ones(1, device=DEVICE)
    assert waits(lambda: one + 1) == 0 and waits(lambda: (one.item(), one.tolist())) == 2
    engine = make(llama, committee(llama, 5))
    endless(engine)
    decoder = engine._scheduler.decoder
    assert decoder is not None
    question = (token_ids(llama, 30, 1), token_ids(llama, 4, 2))

    def submit() -> int:
        return engine.submit(Request(question, aggregate=aggregate, sampling=sampling, early_end=False))

    def step() -> list[Event]:
        return engine.step()

    for _ in range(2):  # the first round captures the graphs of five and of ten rows
        first = submit()
        step()
        steady = [waits(step) for _ in range(4)]
        submit()
        step()
        plan = decoder._current
        both = [waits(step) for _ in range(4)]
        assert decoder._current is not plan
        engine.abort(first)
        left = [waits(step) for _ in range(4)]
        assert tokens(step()) == (5 if aggregate == "vote" else 1)  # and the second is still under way
        while engine.busy:
            step()
    assert [steady, both, left] == [[1] * 4] * 3
    check_all_back(engine)


# --- what is chosen where nothing is asked for -------------------------------------------------------------------------------------


def test_the_defaults_of_a_gpu(tiny: Tiny) -> None:
    """bfloat16 as close to the CPU's float32 as the definition is in bfloat16: at most twice its error, and one rounding of a logit."""
    experts = committee(tiny, 5)
    engine = Engine(tiny.folder, dtype="bfloat16", kv_cache_tokens=16384)
    assert engine.model.device.type == "cuda" and engine.pool.page_size == 64
    assert engine.model.impl == "triton" and isinstance(engine._scheduler.decoder, Decoder)
    plain = make(tiny, experts, dtype="bfloat16", impl="reference")
    assert plain._scheduler.decoder is None  # the definition waits for the device: it cannot be captured
    for expert in experts:
        engine.add_expert(expert)
    question, options = (token_ids(tiny, 100, 1), token_ids(tiny, 4, 2)), [[token] for token in range(20, 60)]
    exact, own, found = (e.score(question, options).logprobs for e in (on_cpu(tiny, experts), plain, engine))
    spread = float((exact.amax(-1) - exact.amin(-1)).max())
    band = torch.finfo(torch.bfloat16).eps * spread
    assert float((found - exact).abs().max()) <= 2 * float((own - exact).abs().max()) + band
    answer = engine.ask(question, sampling=replace(SAMPLINGS[1], max_tokens=100), early_end=False)
    assert all(record.tokens and -torch.inf < record.logprob < 0 for record in answer.experts)
    assert captured(engine) > 0
    check_all_back(engine)


def test_the_pool_takes_most_of_the_memory_that_is_free(llama: Tiny) -> None:
    """Asked, not taken: other tests want memory too."""
    engine = make(llama, [soft_prompt(llama, 3, 1, "one", "suffix")])
    config, pool = engine.model.config, engine.pool
    a_page = (pool.k[:, 0].numel() + pool.v[:, 0].numel()) * pool.k.element_size()
    free = torch.cuda.mem_get_info(engine.model.device)[0]
    pages = _pool_pages(config, torch.float32, engine.model.device, None, pool.page_size)
    assert 0.75 * free < pages * a_page < 0.9 * free
    half = _pool_pages(config, torch.bfloat16, engine.model.device, None, pool.page_size)
    assert half == pytest.approx(2 * pages, rel=0.05)
