"""The plan of one step: which rows see which pages. Everything that tells prefill, branch start and decode apart is in here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .schedule import Column, Columns, Schedule, lay_out

FARTHEST = 2**30  # position from 0, either way: kernels hold the difference of two in 32 bits


class Segment(NamedTuple):
    """Consecutive keys in pages, and the consecutive rows that see them."""

    pages: Sequence[int]  # key j lies in pages[j // page_size] at offset j % page_size
    length: int  # keys
    key_begin: int  # position of the first key; negative for a soft prompt in front
    row_begin: int  # rows [row_begin, row_end) see the segment
    row_end: int


class Work(NamedTuple):
    """A schedule on the device, with what a kernel's launch must know of it on the host."""

    tensors: list[
        Tensor
    ]  # int32: header [2] (items, rows to merge), then a Schedule's items, parts, merge_rows, merge_ptr, merge_slots
    tile_rows: int
    slots: int
    in_place: bool


@dataclass(eq=False)
class Plan:
    """The segments and row positions of one step, as int32 tensors on one device.

    Row `i` of segment `g` sees its key `j` iff `key_begin[g] + j <= position[i]`; with a window, also `> position[i] - window`.
    The last three fields are known on the host, so that a plan is checked and cut into work without reading the device.
    """

    position: Tensor  # [R]
    page_ptr: Tensor  # [G+1]  segment g's pages are pages[page_ptr[g] : page_ptr[g+1]]
    pages: Tensor  # [page_ptr[G]]
    length: Tensor  # [G]
    key_begin: Tensor  # [G]
    row_begin: Tensor  # [G]
    row_end: Tensor  # [G]
    pages_needed: int  # 1 + the largest page named: a pool must hold at least as many
    page_size_needed: int  # the smallest page size with which every segment's keys fit into its pages
    columns: Columns
    _work: dict[int, Work] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.position.shape[0]

    @property
    def num_segments(self) -> int:
        return self.length.shape[0]

    def work(self, tile_rows: int) -> Work:
        """The plan cut into items for tiles of so many rows: made once, on the host, and kept for the other layers."""
        if tile_rows not in self._work:
            schedule = lay_out(*self.columns, tile_rows)
            tensors = to_device(work_columns(schedule), self.position.device)
            self._work[tile_rows] = Work(tensors, tile_rows, schedule.slots, schedule.in_place)
        return self._work[tile_rows]

    def of_rows(self, rows: Sequence[int]) -> Plan:
        """The plan of some of the rows alone, given in ascending order; they see what they saw."""
        chosen, columns = np.array(rows, dtype=np.int64), self.columns
        ends = (np.searchsorted(chosen, end).astype(np.int32) for end in (columns.row_begin, columns.row_end))
        columns = Columns(columns.position[chosen], columns.length, columns.key_begin, *ends)
        moved = to_device([columns.position, columns.row_begin, columns.row_end], self.position.device)
        position, row_begin, row_end = moved
        return replace(self, position=position, row_begin=row_begin, row_end=row_end, columns=columns, _work={})

    @classmethod
    def from_segments(
        cls,
        segments: Sequence[Segment | tuple[Sequence[int], int, int, int, int]],
        positions: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Plan:
        """Builds a plan from `(pages, length, key_begin, row_begin, row_end)` tuples and one position a row.

        Raises:
            ValueError: a negative page or length, a length without pages, rows outside `[0, len(positions)]`, or keys farther than 2^30
                from position 0; names the segment. Or a row as far.
        """
        table = [Segment(*segment) for segment in segments]
        rows = len(positions)
        if rows and not -FARTHEST <= min(positions) <= max(positions) <= FARTHEST:
            raise ValueError(f"positions: {min(positions)} to {max(positions)}; accepted: {-FARTHEST} to {FARTHEST}")
        pages_needed, page_size_needed, page_ptr = 0, 1, [0]
        for index, segment in enumerate(table):
            if segment.length < 0 or (segment.length > 0 and not segment.pages):
                raise ValueError(
                    f"segment {index}: length {segment.length} with {len(segment.pages)} pages; accepted: at least 0, and pages for it"
                )
            if not 0 <= segment.row_begin <= segment.row_end <= rows:
                raise ValueError(
                    f"segment {index}: rows [{segment.row_begin}, {segment.row_end}) lie outside the step's [0, {rows})"
                )
            end = segment.key_begin + segment.length
            if not -FARTHEST <= segment.key_begin <= end <= FARTHEST:
                raise ValueError(
                    f"segment {index}: keys at [{segment.key_begin}, {end}); accepted: within [{-FARTHEST}, {FARTHEST})"
                )
            if segment.pages:
                if min(segment.pages) < 0:
                    raise ValueError(f"segment {index}: page {min(segment.pages)} is negative")
                pages_needed = max(pages_needed, 1 + max(segment.pages))
                page_size_needed = max(page_size_needed, -(-segment.length // len(segment.pages)))
            page_ptr.append(page_ptr[-1] + len(segment.pages))

        def column(values: Sequence[int]) -> Column:
            return np.array(values, dtype=np.int32)

        pages = column(list(chain.from_iterable(segment.pages for segment in table)))
        columns = Columns(
            column(list(positions)),
            column([segment.length for segment in table]),
            column([segment.key_begin for segment in table]),
            column([segment.row_begin for segment in table]),
            column([segment.row_end for segment in table]),
        )
        moved = to_device([columns.position, column(page_ptr), pages, *columns[1:]], device)
        at, starts, named, lengths, keys, begins, ends = moved
        return cls(at, starts, named, lengths, keys, begins, ends, pages_needed, page_size_needed, columns)


class FixedPlan(Plan):
    """A plan of fixed capacity whose tensors stay where they are, for a captured graph to read; `load` puts another plan into them.

    What is not filled is empty: rows that see nothing, segments without keys, no items.

    Args:
        rows, segments, pages: capacities; items, parts, merges, slots: those of its schedule.
        tile_rows: rows of the schedule's tiles; None: no kernel asks for a schedule.
        device: of the tensors.
    """

    def __init__(
        self,
        rows: int,
        segments: int,
        pages: int,
        items: int,
        parts: int,
        merges: int,
        slots: int,
        tile_rows: int | None,
        device: torch.device | str,
    ):
        # What moves on, and by how much, first: positions and lengths lie in one piece each, so that one addition does it.
        shapes: list[tuple[int, ...]] = [(rows,), (segments,)] * 2
        shapes += [(segments + 1,), (pages,), *[(segments,)] * 3]
        shapes += [(2,), (items, 6), (parts, 3), (rows,), (rows + 1,), (merges,)]
        starts, size = _starts([math.prod(shape) for shape in shapes])
        cuda = torch.device(device).type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=cuda)
        self._device = self._host.to(device)
        # The device reads pinned memory some time after `load`, which must not overwrite what is not read yet.
        self._copied = torch.cuda.Event() if cuda else None
        self._columns = [
            self._host.numpy()[start : start + math.prod(shape)] for start, shape in zip(starts, shapes, strict=True)
        ]
        views = [
            self._device[start : start + math.prod(shape)].view(shape)
            for start, shape in zip(starts, shapes, strict=True)
        ]
        self.tile_rows = tile_rows
        work = {} if tile_rows is None else {tile_rows: Work(views[9:], tile_rows, slots, False)}
        position, length, _, _, page_ptr, named, key_begin, row_begin, row_end = views[:9]
        nothing = Columns(*[np.zeros(0, dtype=np.int32)] * 5)
        super().__init__(position, page_ptr, named, length, key_begin, row_begin, row_end, 0, 1, nothing, work)
        # numpy's arrays on a CPU: a step's first operation of torch costs it 50 us there, for this one alone.
        store = self._device if cuda else self._device.numpy()
        self._moving, self._by = store[: starts[2]], store[starts[2] : starts[4]]

    def load(self, plan: Plan, schedule: Schedule | None, grows: Sequence[int]) -> bool:
        """Takes over a plan on the CPU and its schedule; False, and nothing taken, where they do not fit.

        Args:
            grows: the segments that get one more key at every `advance`.
        """
        position, length, key_begin, row_begin, row_end = plan.columns
        key_step = np.zeros(len(length), dtype=np.int32)
        key_step[list(grows)] = 1
        columns = [position, length, np.ones_like(position), key_step]
        columns += [plan.page_ptr.numpy(), plan.pages.numpy(), key_begin, row_begin, row_end]
        if schedule is not None:
            columns += work_columns(schedule)
            if schedule.in_place or schedule.slots > self._work[self.tile_rows or 0].slots:
                return False
        if any(column.size > mine.size for column, mine in zip(columns, self._columns, strict=False)):
            return False
        if self._copied is not None:
            self._copied.synchronize()
        for column, mine in zip(columns, self._columns, strict=False):
            mine[: column.size] = column.ravel()
            mine[column.size :] = 0
        self._columns[4][len(length) + 1 :] = plan.pages.numel()  # empty segments have no pages
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device.device))
        self.pages_needed, self.page_size_needed = plan.pages_needed, plan.page_size_needed
        return True

    def advance(self) -> None:
        """One token further: every row's position, and the length of every segment that grows, on the device."""
        self._moving += self._by


def work_columns(schedule: Schedule) -> list[Column]:
    """The arrays of a `Work`, on the host."""
    header = np.array([len(schedule.items), len(schedule.merge_rows)], dtype=np.int32)
    return [header, schedule.items, schedule.parts, schedule.merge_rows, schedule.merge_ptr, schedule.merge_slots]


def _starts(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of these sizes begin in one buffer, each at a multiple of 16 bytes: kernels are specialised for one alignment only."""
    padded = [-(-size // 4) * 4 for size in sizes]
    return [0, *accumulate(padded)][:-1], sum(padded)


def to_device(columns: Sequence[Column], device: torch.device | str) -> list[Tensor]:
    """Moves arrays in one copy."""
    starts, size = _starts([column.size for column in columns])
    buffer = np.zeros(size, dtype=np.int32)
    for start, column in zip(starts, columns, strict=True):
        buffer[start : start + column.size] = column.ravel()
    moved = torch.from_numpy(buffer).to(device, non_blocking=True)
    return [
        moved[start : start + column.size].view(column.shape) for start, column in zip(starts, columns, strict=True)
    ]
