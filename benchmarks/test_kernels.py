"""Each operation beside plain PyTorch, on the GPU where there is one: `pytest benchmarks --benchmark-only`.

A result is checked before it is timed. On a GPU one round is a pass over all copies of the inputs (`extra_info` says how many), replayed as
one CUDA graph; on a CPU it is one call. For rates, floors and the other peers: `whispers bench kernels`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from whispers_engine.bench.attention import DecodeInputs, DecodeShape, Heads
from whispers_engine.bench.measure import Call, launches
from whispers_engine.bench.peers import sdpa_repeated
from whispers_engine.bench.small_ops import OpCase, Widths, calls, op_cases

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
HEADS = Heads(32, 8, 128) if CUDA else Heads(8, 2, 32)
WIDTHS = Widths(4096, 14336, 128256, 32, 8, 128, DTYPE) if CUDA else Widths(256, 688, 4096, 8, 4, 32, DTYPE)
SHAPES = [
    DecodeShape("x".join(map(str, HEADS)), HEADS, experts, context, DTYPE)
    for experts, context in (((1, 2048), (8, 2048), (32, 8192)) if CUDA else ((1, 256), (8, 256)))
]
CASES = list(op_cases(WIDTHS, (8,)))


def timed(benchmark: Any, group: str, run: list[Call]) -> None:
    benchmark.group = group
    if CUDA:
        replay, how = launches(run, 1)
        benchmark.extra_info |= {"calls_a_round": len(run), "how": how}

        def once() -> None:
            replay()
            torch.cuda.synchronize()

        once()
        benchmark(once)
    else:
        turn: Callable[[], Any] = partial(next, itertools.cycle(run))
        benchmark(lambda: turn()())


@pytest.mark.parametrize("who", ["ours", "sdpa-repeated"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"E{shape.experts}-S{shape.context}")
def test_committee_attention(benchmark: Any, shape: DecodeShape, who: str) -> None:
    inputs = DecodeInputs(shape, DEVICE)
    run = inputs.ours("auto") if who == "ours" else sdpa_repeated(inputs)
    verdict = inputs.judge(run[0]().reshape(inputs.exact.shape))
    assert verdict.ok, f"wrong, and not timed: {verdict}"
    timed(benchmark, f"committee_attention E {shape.experts}, S {shape.context}", run)


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_operation(benchmark: Any, case: OpCase, who: str) -> None:
    sets = case.sets(DEVICE)
    run: Callable[..., Any] = partial(case.ours, impl="auto") if who == "ours" else case.plain
    verdict = case.judge(run, sets[0])
    assert verdict.ok, f"wrong, and not timed: {verdict}"
    timed(benchmark, f"{case.op} {case.shape}", calls(run, sets))
