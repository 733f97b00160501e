"""A schedule names every key of every row once, in an order that the row's keys alone decide, and no two partial results share a place."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.plans import Case, cases, schedule_constants
from whispers_kernels import Plan, schedule
from whispers_kernels.plan import to_device, work_columns
from whispers_kernels.schedule import Column, Columns, Schedule, key_ranges, last_boundary, lay_out, next_boundary

thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TILE_ROWS = (1, 2, 3, 5, 16, 64)
# As they are, all keys of a random plan are one range and few rows merge in place. Lowered, its segments have up to thirteen ranges.
CONSTANTS: tuple[dict[str, int], ...] = (
    {},
    {"RANGE": 8, "ALIGN": 4, "ROWS_IN_PLACE": 2, "PARTIALS_AT_MOST": 12},
    {"RANGE": 3, "ALIGN": 1, "ROWS_IN_PLACE": 6, "PARTIALS_AT_MOST": 30},
    {"RANGE": 4, "ALIGN": 4, "ROWS_IN_PLACE": 9, "PARTIALS_AT_MOST": 4096},
    {"RANGE": 5, "ALIGN": 2, "ROWS_IN_PLACE": 10**6, "PARTIALS_AT_MOST": 10**6},
)


class Part(NamedTuple):
    """Keys `[begin, end)` of a segment."""

    segment: int
    begin: int
    end: int


class Item(NamedTuple):
    rows: range
    parts: list[Part]
    slots: range  # of its rows' partial results; in place there are none
    in_place: bool


def items_of(made: Schedule) -> list[Item]:
    found = []
    for row_begin, row_end, part_begin, part_end, slot, in_place in made.items.tolist():
        parts = [Part(*part) for part in made.parts[part_begin:part_end].tolist()]
        rows = range(row_begin, row_end)
        found.append(Item(rows, parts, range(slot, slot if in_place else slot + len(rows)), bool(in_place)))
    return found


def merges_of(made: Schedule) -> dict[int, list[int]]:
    """Row -> slots, of the rows that are merged after the items."""
    pointers = made.merge_ptr.tolist()
    assert len(pointers) == len(made.merge_rows) + 1 and pointers[0] == 0 and pointers[-1] == len(made.merge_slots)
    slots = made.merge_slots.tolist()
    merges = {row: slots[a:b] for row, (a, b) in zip(made.merge_rows.tolist(), pairwise(pointers), strict=True)}
    assert len(merges) == len(made.merge_rows)  # no row twice
    return merges


def orders_of(made: Schedule) -> dict[int, list[Part]]:
    """Row -> the key ranges whose partial results make its result, in the order of merging."""
    at_slot = {
        item.slots[index]: (row, item.parts[0])
        for item in items_of(made)
        if not item.in_place
        for index, row in enumerate(item.rows)
    }
    orders = {row: item.parts for item in items_of(made) if item.in_place for row in item.rows}
    for row, slots in merges_of(made).items():
        assert row not in orders and all(at_slot[slot][0] == row for slot in slots)
        orders[row] = [at_slot[slot][1] for slot in slots]
    return orders


def ranges_of(columns: Columns, row: int) -> list[Part]:
    """What a row's order must be: the ranges of the segments that name it, by the position of their first key."""
    parts = [
        Part(segment, begin, end)
        for segment in range(len(columns.length))
        if columns.row_begin[segment] <= row < columns.row_end[segment]
        for begin, end in key_ranges(int(columns.key_begin[segment]), int(columns.length[segment]))
    ]
    return sorted(parts, key=lambda part: (columns.key_begin[part.segment] + part.begin, part.segment))


def on_schedules(test: Any) -> Any:
    """Runs a test on random steps, tiles and constants."""
    return thorough(given(cases(), st.sampled_from(TILE_ROWS), st.sampled_from(CONSTANTS))(test))


@on_schedules
def test_a_rows_results_are_merged_in_the_order_of_its_keys(case: Case, tile: int, values: dict[str, int]) -> None:
    columns = case.plan().columns
    with schedule_constants(values):
        made = lay_out(*columns, tile)
        assert orders_of(made) == {row: ranges_of(columns, row) for row in range(len(case.positions))}


@on_schedules
def test_every_key_is_read_once_for_every_row_that_its_segment_names(
    case: Case, tile: int, values: dict[str, int]
) -> None:
    """By the items alone; which of the keys a row sees, its position decides later."""
    with schedule_constants(values):
        made = lay_out(*case.plan().columns, tile)
    read: dict[tuple[int, int], list[tuple[int, int]]] = {}  # row, segment -> ranges
    for item in items_of(made):
        assert 0 < len(item.rows) <= tile and len(item.parts) > 0
        for segment, begin, end in item.parts:
            assert begin < end
            assert case.segments[segment].row_begin <= item.rows[0] and item.rows[-1] < case.segments[segment].row_end
            for row in item.rows:
                read.setdefault((row, segment), []).append((begin, end))
    named = {
        (row, number): segment.length
        for number, segment in enumerate(case.segments)
        if segment.length > 0
        for row in range(segment.row_begin, segment.row_end)
    }
    assert read.keys() == named.keys()
    for pair, ranges in read.items():
        ends, begins = [0, *(end for _, end in sorted(ranges))], [begin for begin, _ in sorted(ranges)]
        assert ends == [*begins, named[pair]]  # each begins where the one before it ends


@on_schedules
def test_no_two_partial_results_share_a_slot(case: Case, tile: int, values: dict[str, int]) -> None:
    with schedule_constants(values):
        made = lay_out(*case.plan().columns, tile)
    items = items_of(made)
    taken = [slot for item in items for slot in item.slots]
    assert sorted(taken) == list(range(made.slots))  # and none is for nothing
    assert all(len(item.parts) == 1 for item in items if not item.in_place)
    assert made.in_place == any(item.in_place for item in items)
    merged = [slot for slots in merges_of(made).values() for slot in slots]
    assert sorted(merged) == sorted(slot for item in items if not item.in_place for slot in item.slots)


@on_schedules
def test_the_largest_items_come_first(case: Case, tile: int, values: dict[str, int]) -> None:
    """Keys that lie after every row of an item that merges in place are not counted: most of a prefill's."""
    with schedule_constants(values):
        made = lay_out(*case.plan().columns, tile)

    def keys(item: Item) -> int:
        if not item.in_place:
            return sum(part.end - part.begin for part in item.parts)
        reach = max(case.positions[row] for row in item.rows)
        begins = {part.segment: case.segments[part.segment].key_begin for part in item.parts}
        return sum(begins[part.segment] + j <= reach for part in item.parts for j in range(part.begin, part.end))

    sizes = [keys(item) for item in items_of(made)]
    assert sizes == sorted(sizes, reverse=True)


@on_schedules
def test_where_a_row_merges_is_chosen_by_the_rows_that_share_all_its_segments(
    case: Case, tile: int, values: dict[str, int]
) -> None:
    """In place from so many rows or partial results on; never where there is nothing to see."""
    columns = case.plan().columns
    with schedule_constants(values):
        in_place = {row for item in items_of(lay_out(*columns, tile)) if item.in_place for row in item.rows}
        cuts = {0, len(case.positions)}
        for segment in case.segments:
            if segment.length > 0 and segment.row_begin < segment.row_end:
                cuts |= {segment.row_begin, segment.row_end}
        for begin, end in pairwise(sorted(cuts)):
            partials = (end - begin) * len(ranges_of(columns, begin))
            many = end - begin >= schedule.ROWS_IN_PLACE or partials > schedule.PARTIALS_AT_MOST
            assert {row in in_place for row in range(begin, end)} == {many and partials > 0}


def test_random_plans_reach_both_ways_of_merging_and_many_ranges() -> None:
    """Without this the tests above might show less than they seem to: forty plans suffice for all of it."""
    seen: set[str] = set()

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(cases())
    def collect(case: Case) -> None:
        for values in CONSTANTS:
            with schedule_constants(values):
                made = lay_out(*case.plan().columns, 3)
            items = items_of(made)
            seen.update(
                name
                for name, holds in {
                    "both ways in one plan": made.in_place and any(made.merge_slots),
                    "in place over tiles": sum(item.in_place for item in items) > 1,
                    "in place over ranges": any(item.in_place and len(item.parts) > 3 for item in items),
                    "rows over tiles": any(not item.in_place and item.rows[0] > 0 for item in items),
                    "many ranges to merge": any(len(slots) > 5 for slots in merges_of(made).values()),
                    "nothing to merge": any(not slots for slots in merges_of(made).values()),
                }.items()
                if holds
            )

    collect()
    assert len(seen) == 6, seen


# --- where keys are cut -------------------------------------------------------------------------------------------------------------


def test_boundaries_are_those_of_a_plain_enumeration() -> None:
    """Eight ranges of each size, each size twice the one before; before position 0 all have the first."""
    size = schedule.RANGE
    boundaries = list(range(-4 * size, 0, size))
    for level in range(5):
        begin = 8 * size * (2**level - 1)
        boundaries += range(begin, begin + 8 * (size << level), size << level)
    assert len(boundaries) == 4 + 5 * 8 and boundaries[4] == 0
    near = {position for boundary in boundaries for position in (boundary - 1, boundary, boundary + 1)}
    positions = {*near, *range(boundaries[0], boundaries[-1], 37)} & set(range(boundaries[0], boundaries[-1]))
    for position in positions:
        assert next_boundary(position) == min(b for b in boundaries if b > position)
        if position >= 0:
            assert last_boundary(position) == max(b for b in boundaries if b <= position)


def test_ranges_grow_with_the_keys_before_them() -> None:
    """So that a row of 32k keys is work for a whole chip, and its partial results are few beside its keys."""
    ranges = key_ranges(0, 32768)
    sizes = [end - begin for begin, end in ranges]
    assert len(ranges) <= 33 and max(sizes) == 2048 and sizes[:-1] == sorted(sizes[:-1])
    assert all(end - begin <= max(schedule.RANGE, begin / 4) for begin, end in ranges)


@thorough
@given(st.integers(-600, 9000), st.integers(0, 3000), st.sampled_from(CONSTANTS))
def test_ranges_cover_a_segment_and_begin_where_tiles_do(key_begin: int, length: int, values: dict[str, int]) -> None:
    with schedule_constants(values):
        ranges = key_ranges(key_begin, length)
        assert [0, *(end for _, end in ranges)] == [*(begin for begin, _ in ranges), length]
        assert all(begin < end and begin % schedule.ALIGN == 0 for begin, end in ranges)


@thorough
@given(st.integers(-600, 9000), st.integers(1, 3000), st.sampled_from(CONSTANTS))
def test_keys_that_a_row_does_not_see_move_no_cut_of_those_it_sees(
    key_begin: int, length: int, values: dict[str, int]
) -> None:
    """Rows that come later make a segment longer, and a captured step is cut for the keys to come: the same bits for all that."""
    with schedule_constants(values):
        ranges = key_ranges(key_begin, length)
        near = {begin + more for begin, _ in ranges for more in (-1, 0, 1, schedule.ALIGN - 1, schedule.ALIGN)}
        for shorter in near & set(range(1, length)):
            seen = [(begin, min(end, shorter)) for begin, end in ranges if begin < shorter]
            assert key_ranges(key_begin, shorter) == seen


@thorough
@given(st.integers(0, 9000), st.integers(1, 3000), st.sampled_from(CONSTANTS[::3]))
def test_a_segment_cut_in_two_at_a_boundary_has_the_same_ranges(
    key_begin: int, length: int, values: dict[str, int]
) -> None:
    """Where whole pages that requests share end. Boundaries are multiples of ALIGN here, as they are of RANGE."""
    with schedule_constants(values):
        key_begin -= key_begin % schedule.ALIGN
        cut = last_boundary(key_begin + length - 1) - key_begin
        if cut > 0:
            first, second = key_ranges(key_begin, cut), key_ranges(key_begin + cut, length - cut)
            assert [*first, *((cut + begin, cut + end) for begin, end in second)] == key_ranges(key_begin, length)


# --- a plan's work on the device ------------------------------------------------------------------------------------------------------

PLAN = Plan.from_segments([([3, 1], 5, 0, 0, 3), ([0], 2, 5, 0, 1), ([], 0, 0, 0, 2), ([2], 1, -1, 1, 2)], [6, 5, 5])


def test_a_plan_keeps_its_work_for_the_other_layers() -> None:
    plan = Plan.from_segments([([0], 5, 0, 0, 128)], [5] * 128)
    work = plan.work(2)
    assert plan.work(2) is work and plan.work(3) is not work and plan.work(2) is work
    assert (work.tile_rows, plan.work(3).tile_rows) == (2, 3)
    assert work.in_place and not Plan.from_segments([([0], 5, 0, 0, 127)], [5] * 127).work(2).in_place


@pytest.mark.parametrize("tile", [1, 2, 16])
def test_work_is_the_schedule_on_the_device(tile: int) -> None:
    made, work = lay_out(*PLAN.columns, tile), PLAN.work(tile)
    header, *tensors = work.tensors
    assert header.tolist() == [len(made.items), len(made.merge_rows)]
    assert [tensor.tolist() for tensor in tensors] == [column.tolist() for column in made[:5]]
    assert [tuple(tensor.shape) for tensor in tensors] == [column.shape for column in made[:5]]
    assert (work.slots, work.in_place) == (made.slots, made.in_place)
    assert all(tensor.dtype == torch.int32 for tensor in work.tensors)
    assert len(work_columns(made)) == len(work.tensors)


@given(st.lists(st.lists(st.integers(-9, 9), max_size=9), max_size=6))
def test_arrays_moved_together_arrive_whole_and_aligned(values: list[list[int]]) -> None:
    """At 16 bytes: a kernel compiled for aligned pointers would be compiled again, or read wrongly, for others."""
    columns: list[Column] = [np.array(row, dtype=np.int32) for row in values]
    columns.append(np.arange(6, dtype=np.int32).reshape(2, 3))
    moved = to_device(columns, "cpu")
    assert [tensor.tolist() for tensor in moved] == [column.tolist() for column in columns]
    assert all(tensor.data_ptr() % 16 == 0 and tensor.is_contiguous() for tensor in moved if tensor.numel() > 0)


def test_an_empty_plan_has_no_work() -> None:
    made = lay_out(*Plan.from_segments([], []).columns, 4)
    assert made.items.shape == (0, 6) and made.parts.shape == (0, 3) and made.merge_rows.shape == (0,)
    assert made.merge_ptr.tolist() == [0] and (made.slots, made.in_place) == (0, False)
