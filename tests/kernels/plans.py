"""Random plans and pools for the attention tests of every implementation. Nothing in here calls a kernel.

`cases()` draws a step as an engine lays it out (a system prompt seen by several requests, each request's context, pinned soft prompts
in front, a branch's own pages, options after it; rows in depth-first order) and then disturbs it: a segment named twice, empty
segments, rows that see nothing, segments in any order. `Case.inputs` fills a pool for it, NaN wherever no row has business.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from whispers_kernels import Plan, Segment, schedule

FP8 = torch.float8_e4m3fn
PAGE_SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 16)
GROUPS = (1, 2, 3, 4, 8)  # q heads a kv head
DIMS = (4, 16, 20)
BEFORE_EVERY_KEY = -1000


class Inputs(NamedTuple):
    """The tensors of `committee_attention`."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def keys(self) -> Tensor:
        """The pool's keys as float64, fp8 ones multiplied by their scales."""
        return self.k_pages.double() * (1 if self.k_scale is None else self.k_scale.double()[..., None])

    def values(self) -> Tensor:
        return self.v_pages.double() * (1 if self.v_scale is None else self.v_scale.double()[..., None])


@dataclass(frozen=True)
class Case:
    """One step: a table of segments, the rows' positions, and the pool's shape."""

    segments: tuple[Segment, ...]
    positions: tuple[int, ...]
    page_size: int
    num_pages: int
    group: int = 1
    kv_heads: int = 1
    dim: int = 4
    seed: int = 0

    def plan(self, device: torch.device | str = "cpu") -> Plan:
        return Plan.from_segments(self.segments, self.positions, device)

    def visible(self, row: int, window: int | None = None) -> list[tuple[int, int]]:
        """`(page, offset)` of every key that `row` sees, one at a time, as the definition reads."""
        position = self.positions[row]
        return [
            (pages[j // self.page_size], j % self.page_size)
            for pages, length, key_begin, row_begin, row_end in self.segments
            for j in range(length)
            if row_begin <= row < row_end
            and key_begin + j <= position
            and (window is None or key_begin + j > position - window)
        ]

    def keep(self, rows: Sequence[int]) -> Case:
        """The same step with only these rows (ascending) in it."""
        segments = tuple(
            segment._replace(row_begin=bisect_left(rows, segment.row_begin), row_end=bisect_left(rows, segment.row_end))
            for segment in self.segments
        )
        return replace(self, segments=segments, positions=tuple(self.positions[row] for row in rows))

    def covered(self) -> Tensor:
        """bool `[pages, page_size]`: the slots that belong to a segment with rows."""
        mask = torch.zeros(self.num_pages, self.page_size, dtype=torch.bool)
        for pages, length, _, row_begin, row_end in self.segments:
            for j in range(length if row_begin < row_end else 0):
                mask[pages[j // self.page_size], j % self.page_size] = True
        return mask

    def inputs(
        self, dtype: torch.dtype, pages_dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Inputs:
        """Normal values, the same pool for every set of rows. Slots that are not `covered` hold NaN, and so do their scales."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_pages, self.page_size, self.kv_heads)
        stray = ~self.covered()

        def pool() -> Tensor:
            values = torch.randn(*shape, self.dim, generator=generator, dtype=torch.float64)
            values[stray] = torch.nan
            return values.to(pages_dtype or dtype).to(device)

        def scales() -> Tensor | None:
            values = torch.rand(shape, generator=generator) + 0.5
            values[stray] = torch.nan
            return values.to(device) if pages_dtype == FP8 else None

        k_pages, v_pages, k_scale, v_scale = pool(), pool(), scales(), scales()
        heads = self.group * self.kv_heads
        q = torch.randn(len(self.positions), heads, self.dim, generator=generator, dtype=torch.float64)
        return Inputs(q.to(dtype).to(device), k_pages, v_pages, k_scale, v_scale)


@contextmanager
def schedule_constants(values: dict[str, int]) -> Iterator[None]:
    """Other numbers in `schedule`, so that small plans come by several ranges of keys, and by rows that merge in place."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(schedule, name, value)
        yield


def options() -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments of `committee_attention` that change its result."""
    return st.fixed_dictionaries(
        {
            "scale": st.sampled_from((None, 0.3, 1.0)),
            "window": st.none() | st.integers(1, 40),
            "softcap": st.sampled_from((None, 0.5, 20.0)),
        }
    )


@st.composite
def cases(draw: st.DrawFn, page_sizes: Sequence[int] = PAGE_SIZES, dims: Sequence[int] = DIMS) -> Case:
    """Steps of one to some hundred rows. Shrinks to one row, one request and short segments."""
    page_size = draw(st.sampled_from(page_sizes))
    lengths = st.integers(0, 2) | st.sampled_from((page_size - 1, page_size, page_size + 1, 2 * page_size + 1))
    numbers = count()
    segments: list[Segment] = []
    positions: list[int] = []

    def fresh(length: int) -> list[int]:
        """Enough pages for `length` keys, at times one more than that."""
        return [next(numbers) for _ in range(-(-length // page_size) + draw(st.sampled_from((0, 0, 1))))]

    def see(pages: list[int], length: int, key_begin: int, row_begin: int) -> None:
        """A segment seen by every row since `row_begin`."""
        segments.append(Segment(pages, length, key_begin, row_begin, len(positions)))

    def add_rows(last: int, end: int) -> None:
        """Up to `last` rows for the positions before `end`."""
        positions.extend(range(end - draw(st.integers(min(1, last), last)), end))

    soft_prompts = [(fresh(m), m) for m in draw(st.lists(st.integers(1, page_size + 1), max_size=2))]
    system = draw(lengths)
    for _ in range(draw(st.integers(1, 3))):
        request, context = len(positions), draw(lengths)
        context_end = system + context
        if draw(st.booleans()):  # a chunk of prefill
            add_rows(min(context, 5), context_end)
        for _ in range(draw(st.integers(0, 3))):
            branch, own = len(positions), draw(lengths)
            add_rows(min(own, 3), context_end + own)
            for tokens in draw(st.lists(st.integers(1, page_size + 1), max_size=2)):
                option = len(positions)
                add_rows(min(tokens, 3), context_end + own + tokens)
                see(fresh(tokens), tokens, context_end + own, option)
            see(fresh(own), own, context_end, branch)
            for pages, m in draw(st.lists(st.sampled_from(soft_prompts), max_size=1)) if soft_prompts else ():
                see(pages, m, -m, branch)
        see(fresh(context), context, system, request)
    if not positions:
        positions.append(system)
    see(fresh(system), system, 0, 0)

    positions.extend([system] * draw(st.integers(0, 1)))  # a row that no segment names
    rows = len(positions)
    for row in draw(st.lists(st.integers(0, rows - 1), max_size=2)):
        positions[row] = BEFORE_EVERY_KEY
    if draw(st.booleans()):  # keys named twice, by all or some of the rows that saw them
        twice = draw(st.sampled_from(segments))
        segments.append(twice._replace(row_begin=draw(st.integers(twice.row_begin, twice.row_end))))
    no_page, no_key, no_row = Segment([], 0, 0, 0, rows), Segment([0], 0, 0, 0, rows), Segment([0], 1, 0, rows, rows)
    segments.extend(draw(st.lists(st.sampled_from((no_page, no_key, no_row)), max_size=2)))
    if draw(st.booleans()):
        segments = draw(st.permutations(segments))

    seed = draw(st.integers(0, 2**16))
    num_pages = next(numbers) + 2
    shuffled = Random(seed).sample(range(num_pages), num_pages)  # neighbours in a segment are strangers in the pool
    return Case(
        tuple(segment._replace(pages=[shuffled[page] for page in segment.pages]) for segment in segments),
        tuple(positions),
        page_size,
        num_pages,
        draw(st.sampled_from(GROUPS)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(dims)),
        seed,
    )
