"""A plan of fixed capacity that moves on by itself is at every step the plan that would be made anew, in tensors that stay where they are.

Results are compared bit for bit: the schedule was cut for keys to come, and rows, segments and items that are not there change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.impls import device_of, every_impl
from tests.kernels.plans import Case, cases, schedule_constants
from whispers_kernels import Segment, committee_attention
from whispers_kernels.ops import check_impl, tile_rows
from whispers_kernels.plan import FixedPlan
from whispers_kernels.schedule import Schedule, lay_out
from whispers_kernels.verify_checks import new_memory_is_nan

# The interpreter computes with numpy, which warns of the infinities that a kernel makes and handles.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# So that short segments have several ranges. A tile of float32 keys has 32 at most, and belongs to one of them.
SMALL_RANGES = {"RANGE": 32, "ALIGN": 32}


def moved(case: Case, grows: list[int], steps: int) -> Case:
    """The case so many steps on: every row's position, and the keys of the segments that grow."""
    segments = tuple(
        segment._replace(length=segment.length + steps) if index in grows else segment
        for index, segment in enumerate(case.segments)
    )
    return replace(case, segments=segments, positions=tuple(position + steps for position in case.positions))


def spare(case: Case, segment: Segment) -> int:
    """Keys that a segment's pages have room for."""
    return len(segment.pages) * case.page_size - segment.length


def tile_of(case: Case, impl: str) -> int | None:
    """Rows of the tiles that an implementation wants a plan cut into."""
    check_impl(impl)
    return tile_rows(impl, torch.float32, torch.float32, case.group, case.dim, device_of(impl))


def cut(case: Case, grows: list[int], rows: int, tile: int | None) -> Schedule | None:
    """The schedule of `rows` rows for all the keys that the growing segments' pages have room for."""
    if tile is None:
        return None
    columns = case.plan().columns
    length = columns.length.copy()
    for index in grows:
        length[index] = len(case.segments[index].pages) * case.page_size
    return lay_out(*columns._replace(position=np.resize(columns.position, rows), length=length), tile)


def sizes(case: Case, schedule: Schedule | None, rows: int) -> dict[str, int]:
    """The smallest capacities that such a plan fits."""
    found = {"rows": rows, "segments": len(case.segments), "pages": sum(len(s.pages) for s in case.segments)}
    if schedule is None:
        return {**found, "items": 0, "parts": 0, "merges": 0, "slots": 0}
    items, parts, merges = len(schedule.items), len(schedule.parts), len(schedule.merge_slots)
    return {**found, "items": items, "parts": parts, "merges": merges, "slots": schedule.slots}


def attend(case: Case, plan: Any, inputs: Case, impl: str) -> tuple[Tensor, Tensor]:
    """The plan's rows, and behind them rows that are not there; `inputs` says which slots of the pool hold no NaN."""
    device = device_of(impl)
    q, k_pages, v_pages, *_ = inputs.inputs(torch.float32, device=device)
    q = q.new_ones(plan.num_rows, *q.shape[1:]).index_copy_(0, torch.arange(len(case.positions), device=device), q)
    with new_memory_is_nan():
        out, lse = committee_attention(q, k_pages, v_pages, plan, return_lse=True, impl=impl)
    return out.cpu(), lse.cpu()


def check_steps(case: Case, grows: list[int], looks: Sequence[int], plan: FixedPlan, impl: str) -> None:
    """These steps of a loaded plan, in their order, against the plans made for them. Rows that are not there see nothing."""
    rows, step = len(case.positions), 0
    for look in looks:
        for _ in range(look - step):
            plan.advance()
        step = look
        now = moved(case, grows, step)
        out, lse = attend(now, plan, now, impl)
        wanted = attend(now, now.plan(device_of(impl)), now, impl)
        assert torch.equal(out[:rows], wanted[0]) and torch.equal(lse[:rows], wanted[1])
        assert bool((out[rows:] == 0).all()) and bool((lse[rows:] == -torch.inf).all())


# --- any plan ------------------------------------------------------------------------------------------------------------------------


@every_impl
def test_random_steps_are_the_plans_made_anew(impl: str) -> None:
    """One after the other in the same tensors: of what the one before has left there, nothing shows."""

    @settings(
        max_examples=60 if impl == "reference" else 5, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(st.lists(cases(), min_size=2, max_size=2), st.integers(0, 3), st.data())
    def same(drawn: list[Case], more: int, data: st.DataObject) -> None:
        first, second = drawn
        second = replace(second, group=first.group, kv_heads=first.kv_heads, dim=first.dim)
        rows = max(len(case.positions) for case in drawn) + more
        tile = tile_of(first, impl)
        with schedule_constants({**SMALL_RANGES, "ROWS_IN_PLACE": 10**6}):
            loaded = []
            for case in (first, second):
                room = [index for index, segment in enumerate(case.segments) if segment.length and spare(case, segment)]
                grows = sorted(data.draw(st.sets(st.sampled_from(room)))) if room else []
                steps = min((spare(case, case.segments[index]) for index in grows), default=3)
                loaded.append((case, grows, min(steps, 3), cut(case, grows, rows, tile)))
            needed = [sizes(case, schedule, rows) for case, _, _, schedule in loaded]
            capacity = {
                name: max(a, b) + more for name, a, b in zip(needed[0], *(n.values() for n in needed), strict=True)
            }
            capacity["rows"] = rows
            plan = FixedPlan(**capacity, tile_rows=tile, device=device_of(impl))
            for case, grows, steps, schedule in loaded:
                assert plan.load(case.plan(), schedule, grows)
                check_steps(case, grows, range(steps + 1) if impl == "reference" else [steps], plan, impl)

    same()


# --- a committee's decode steps --------------------------------------------------------------------------------------------------------

PAGE = 16


def decode(own: int = 13) -> tuple[Case, list[int]]:
    """Two requests' branches over a context that is shared in part, one with a soft prompt in front, and the segments of their own."""
    segments = (
        Segment([9, 2, 14], own, 43, 0, 1),
        Segment([4, 11, 13], own, 43, 1, 2),
        Segment([7], 5, -5, 1, 2),
        Segment([5], 11, 32, 0, 2),
        Segment([0, 8, 12], own + 8, 35, 2, 3),
        Segment([6], 3, 32, 2, 3),
        Segment([10, 1], 32, 0, 0, 3),  # what both contexts begin with
    )
    return Case(segments, (42 + own, 42 + own, 42 + own), PAGE, 15, group=2, kv_heads=2, dim=16, seed=3), [0, 1, 4]


@every_impl
def test_branches_go_on_to_the_next_range_and_page(impl: str) -> None:
    """The keys of a range that none of them has reached yet count for nothing. Two ranges begin after 32 of their own keys."""
    case, grows = decode(own=22)
    with schedule_constants(SMALL_RANGES):
        tile = tile_of(case, impl)
        schedule = cut(case, grows, 4, tile)
        plan = FixedPlan(**sizes(case, schedule, 4), tile_rows=tile, device=device_of(impl))
        assert plan.load(case.plan(), schedule, grows)
        check_steps(case, grows, range(18) if impl == "reference" else [0, 2, 3, 10, 11], plan, impl)


# --- what stays, and what does not fit ---------------------------------------------------------------------------------------------------


def tensors(plan: FixedPlan) -> list[Tensor]:
    """All that a kernel is given."""
    work = [] if plan.tile_rows is None else plan.work(plan.tile_rows).tensors
    segments = [plan.length, plan.key_begin, plan.row_begin, plan.row_end]
    return [plan.position, plan.page_ptr, plan.pages, *segments, *work]


def small(more: int = 0, **fewer: int) -> tuple[FixedPlan, Case, list[int], Schedule | None]:
    """A plan that just fits the decode steps in tiles of two rows, or a little more or less in what is named."""
    case, grows = decode()
    schedule = cut(case, grows, 4, 2)
    capacity = {name: size + more - fewer.get(name, 0) for name, size in sizes(case, schedule, 4).items()}
    return FixedPlan(**capacity, tile_rows=2, device="cpu"), case, grows, schedule


def test_tensors_stay_where_they_are() -> None:
    """And where kernels were compiled for: at multiples of 16 bytes. All a step changes is positions and lengths."""
    plan, case, grows, schedule = small(more=3)
    addresses = [tensor.data_ptr() for tensor in tensors(plan)]
    assert all(address % 16 == 0 for address in addresses) and len(addresses) == 7 + 6
    rows, count = len(case.positions), len(case.segments)
    assert plan.load(case.plan(), schedule, grows)
    before = [tensor.clone() for tensor in tensors(plan)]
    for step in range(1, 4):
        plan.advance()
        now = tensors(plan)
        now_case = moved(case, grows, step)
        assert now[0].tolist() == [*now_case.positions, *[0] * (plan.num_rows - rows)]
        assert now[3].tolist() == [*(s.length for s in now_case.segments), *[0] * (plan.num_segments - count)]
        assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(now, before, strict=True)) if i not in (0, 3))
    alone = Case((Segment([3], 2, 0, 0, 1),), (1,), PAGE, 12)
    assert plan.load(alone.plan(), cut(alone, [], plan.num_rows, 2), [])
    plan.advance()
    assert [tensor.data_ptr() for tensor in tensors(plan)] == addresses
    position, page_ptr, pages, length, key_begin, row_begin, row_end, header, *_ = tensors(plan)
    assert position.tolist()[0] == 2 and length.tolist()[0] == 2  # it has stopped growing
    assert page_ptr.tolist() == [0, *[1] * plan.num_segments] and pages.tolist()[0] == 3
    assert not any(column[1:].any() for column in (position, pages, length, key_begin, row_begin, row_end))
    assert header.tolist() == [1, plan.num_rows]  # an item; every row is merged, those that see nothing too


def test_what_a_pool_must_have_is_known_on_the_host() -> None:
    plan, case, grows, schedule = small()
    assert (plan.pages_needed, plan.page_size_needed) == (0, 1)
    assert plan.load(case.plan(), schedule, grows)
    assert (plan.pages_needed, plan.page_size_needed) == (15, 16)
    q, pages = torch.zeros(4, 2, 16), torch.zeros(14, PAGE, 1, 16)
    with pytest.raises(ValueError, match="names page 14; the pool has 14 pages"):
        committee_attention(q, pages, pages, plan, impl="reference")


@pytest.mark.parametrize("name", ["rows", "segments", "pages", "items", "parts", "merges", "slots"])
def test_a_capacity_that_is_too_small_leaves_the_plan_as_it_was(name: str) -> None:
    fits, case, grows, schedule = small()
    assert fits.load(case.plan(), schedule, grows)
    plan, *_ = small(**{name: 2 if name == "rows" else 1})  # the four rows have one to spare
    other = Case((Segment([3], 2, 0, 0, 1),), (1,), PAGE, 12)
    assert plan.load(other.plan(), cut(other, [0], plan.num_rows, 2), [0])
    before, known = [tensor.clone() for tensor in tensors(plan)], (plan.pages_needed, plan.page_size_needed)
    assert not plan.load(case.plan(), schedule, grows)
    assert all(map(torch.equal, tensors(plan), before))
    assert (plan.pages_needed, plan.page_size_needed) == known
    plan.advance()  # as the plan that it still is
    assert plan.position.tolist()[:2] == [2, 0] and plan.length.tolist()[:2] == [3, 0]


def test_rows_that_merge_in_place_are_not_taken() -> None:
    """A kernel of a captured step merges nothing in place: no decode step has so many rows that see all the same."""
    prefill = Case((Segment([0, 1], 32, 0, 0, 32),), tuple(range(32)), PAGE, 2)
    with schedule_constants({"ROWS_IN_PLACE": 32}):
        schedule = cut(prefill, [], 32, 2)
    assert schedule is not None and schedule.in_place
    plan = FixedPlan(32, 9, 9, 99, 99, 99, 999, tile_rows=2, device="cpu")
    assert not plan.load(prefill.plan(), schedule, [])
    assert plan.pages_needed == 0 and not plan.row_end.any()


def test_without_a_schedule_there_is_no_work() -> None:
    """For an implementation that takes a plan as it is."""
    case, grows = decode()
    plan = FixedPlan(**sizes(case, None, 4), tile_rows=None, device="cpu")
    assert plan.load(case.plan(), None, grows)
    check_steps(case, grows, range(4), plan, "reference")
