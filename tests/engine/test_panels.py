"""Pages in panels, as the C++ kernels multiply them, hold the same numbers and give the same bits as pages that lie as everybody's."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import Tiny, soft_prompt, token_ids
from tests.engine.test_decode import endless, follow, make, requests, same
from tests.engine.test_sharing import committee
from whispers_engine import Engine, SamplingParams, Token
from whispers_engine.kv_cache import PagePool
from whispers_kernels import available_impls

DTYPES = ["float32", "bfloat16"]
PLAIN = 8  # a page size that is never in panels


def in_panels(engine: Engine) -> bool:
    return engine.pool.k.dim() == 6


def step_of(dtype: str) -> int:
    """How many neighbours in depth this machine's products take of numbers of that dtype as they are; 0: none."""
    from whispers_kernels.cpp import bf16_step

    return 1 if dtype == "float32" else bf16_step()


needs_cpp = pytest.mark.skipif("cpp" not in available_impls(), reason="no C++ kernels here")


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_the_same_bits(tiny: Tiny, page_size: int, dtype: str) -> None:
    """Contexts that end anywhere in a page, experts of every kind and placement, over pools of NaN."""
    experts = committee(tiny, 5)
    plain, panels = (make(tiny, experts, impl="cpp", dtype=dtype, page_size=size) for size in (PLAIN, page_size))
    assert not in_panels(plain)
    step, dim = step_of(dtype), panels.model.config.head_dim
    assert in_panels(panels) == (step > 0 and dim % max(16, step) == 0 and page_size % step == 0)
    for length in (1, 15, 16, 63, 64, 130, 261):
        question = (token_ids(tiny, length, length), token_ids(tiny, 3, 2))
        want, got = (engine.score(question, [[5], [6, 7]]).logprobs for engine in (plain, panels))
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, atol=0, rtol=0)
    # What is found in the cache depends on the page size; what is answered does not.
    got_tokens, want_tokens = (
        [event for event in follow(engine, requests(tiny)) if isinstance(event, Token)] for engine in (panels, plain)
    )
    assert got_tokens == want_tokens


@needs_cpp
@pytest.mark.parametrize("experts", [1, 3])
def test_the_number_of_threads_changes_no_bits(llama: Tiny, experts: int) -> None:
    """Of few rows each thread has keys of its own, which it fetches ahead where tiles are multiplied."""
    from whispers_kernels import cpp

    engine = make(llama, committee(llama, experts), impl="cpp", dtype="bfloat16", page_size=32)
    endless(engine)
    question, sampling = (token_ids(llama, 400, 1), token_ids(llama, 3, 2)), SamplingParams(max_tokens=12)
    before = cpp.num_threads()
    try:
        answers = []
        for number in (1, 2, 3, 5):
            cpp.set_num_threads(number)
            events = engine.stream(question, sampling=sampling, early_end=False)
            answers.append([(event.expert, event.token, event.logprob) for event in events if isinstance(event, Token)])
    finally:
        cpp.set_num_threads(before)
    assert len(answers[0]) == 12 * experts
    assert all(other == answers[0] for other in answers[1:])


@needs_cpp
@pytest.mark.parametrize("page_size", [8, 24, 128])
def test_other_page_sizes_lie_as_everybodys(llama: Tiny, page_size: int) -> None:
    assert not in_panels(Engine(llama.folder, impl="cpp", page_size=page_size, kv_cache_tokens=1024))


@needs_cpp
def test_panels_that_the_kernels_do_not_read_are_refused(llama: Tiny) -> None:
    engine = Engine(llama.folder, impl="cpp", page_size=8, kv_cache_tokens=1024)
    config, model = engine.model.config, engine.model
    engine._scheduler.pool = PagePool(
        8, 8, config.num_layers, config.kv_heads, config.head_dim, model.dtype, model.device, True
    )
    engine._scheduler.decoder = None
    with pytest.raises(ValueError, match="in panels of 8 tokens; accepted here"):
        engine.score((token_ids(llama, 5, 1), [2]), [[5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [16, 64])
def test_what_is_written_is_read(dtype: torch.dtype, page_size: int) -> None:
    layers, pages, heads, dim, count = 2, 5, 3, 48, 37
    generator = torch.Generator().manual_seed(page_size)
    slots = torch.randperm(pages * page_size, generator=generator)[:count]
    keys, values = torch.randn(2, count, heads, dim, generator=generator)
    pools = [
        PagePool(pages, page_size, layers, heads, dim, dtype, torch.device("cpu"), panels) for panels in (False, True)
    ]
    for pool in pools:
        for store in (pool.k, pool.v):
            store.zero_()
        pool.write(1, slots, keys, values)
    assert pools[0].k.nbytes == pools[1].k.nbytes
    for plain, panels in zip(*(pool.read([3, 0, 4]) for pool in pools), strict=True):
        assert plain.shape == (layers, 3, page_size, heads, dim)
        assert panels.equal(plain)
    at_once = pools[1].read(range(pages))[0][1].flatten(0, 1)[slots]
    assert at_once.equal(keys.to(dtype))


@needs_cpp
def test_a_larger_forward_between_two_steps_of_a_plan(llama: Tiny) -> None:
    """The room that a forward works in is another one after it: the arguments that a decode step keeps are made anew."""
    question = (token_ids(llama, 30, 1), token_ids(llama, 4, 2))
    sampling, names = SamplingParams(max_tokens=40), ["e0", "e1"]
    answers = []
    for joins in (False, True):
        engine = make(llama, committee(llama, 2), impl="cpp", page_size=16)
        endless(engine)
        decoder = engine._scheduler.decoder
        assert decoder is not None and engine.model._packed is not None
        events = engine.stream(question, experts=names, sampling=sampling, early_end=False)
        told = [next(events) for _ in range(21)]
        room, plan = engine.model._packed._room, decoder._current
        if joins:
            engine.add_expert(soft_prompt(llama, 300, 9, "late", "detached"))
            assert engine.model._packed._room is not room
            for tensor in room[1]:
                tensor.fill_(7)
        while len(told) < 26:  # two events a step
            told.append(next(events))
        assert decoder._current is plan
        assert not joins or all(bool((tensor == 7).all()) for tensor in room[1])  # nobody works there any more
        answers.append(told + list(events))
    same(*answers, tolerance=0.0)
