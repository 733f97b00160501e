"""The random plans reach every case that the attention tests claim to cover; without this they might show less than they seem to."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from tests.kernels.plans import BEFORE_EVERY_KEY, DIMS, FP8, GROUPS, PAGE_SIZES, Case, cases

Span = tuple[int, int]


def inside(inner: Span, outer: Span) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1] and inner != outer


def traits(case: Case) -> dict[object, bool]:
    """What may be found in a case, and whether it is."""
    rows = range(len(case.positions))
    used = [segment for segment in case.segments if segment.length and segment.row_begin < segment.row_end]
    spans = {(segment.row_begin, segment.row_end) for segment in used}
    shared = {span for span in spans if any(inside(inner, span) for inner in spans)}
    apart = [(a, b) for a in shared for b in shared if a[1] <= b[0]]  # two contexts with branches of their own
    soft_prompts = [tuple(segment.pages) for segment in used if segment.key_begin < 0]
    return {
        "one row": len(rows) == 1,
        "a shared segment inside a shared segment": any(inside(a, b) for a in shared for b in shared),
        "two requests under one system prompt": any(inside(a, c) and inside(b, c) for a, b in apart for c in spans),
        "two requests, nothing shared": any(not any(inside(a, c) and inside(b, c) for c in spans) for a, b in apart),
        "a soft prompt in front": bool(soft_prompts),
        "a soft prompt of two branches": len(set(soft_prompts)) < len(soft_prompts),
        "no pages": any(not segment.pages for segment in case.segments),
        "no keys in a page": any(segment.pages and not segment.length for segment in case.segments),
        "no rows": any(segment.length and segment.row_begin == segment.row_end for segment in case.segments),
        "a page too many": any(len(s.pages) * case.page_size - s.length >= case.page_size for s in used),
        "a row before every key": BEFORE_EVERY_KEY in case.positions,
        "a row outside every segment": any(all(not begin <= row < end for begin, end in spans) for row in rows),
        "a key named twice": any(len(set(keys)) < len(keys) for keys in map(case.visible, rows)),
        "a key in the future": any(s.key_begin + s.length - 1 > case.positions[s.row_begin] for s in used),
        "segments out of order": [s.row_end for s in used] != sorted(s.row_end for s in used),
        **{("page size", number): case.page_size == number for number in PAGE_SIZES},
        **{("q heads a kv head", number): case.group == number for number in GROUPS},
        **{("head_dim", number): case.dim == number for number in DIMS},
        **{("length - page size", n): any(s.length - case.page_size == n for s in used) for n in (-1, 0, 1)},
    }


def test_every_trait_is_found_in_one_plan_and_absent_from_another() -> None:
    """Fifty plans at a time until that is so; twenty times fifty without is no accident."""
    missing: set[tuple[object, bool]] | None = None
    for attempt in range(20):

        @seed(attempt)
        @settings(max_examples=50, deadline=None, database=None, phases=[Phase.generate])
        @given(cases())
        def collect(case: Case) -> None:
            nonlocal missing
            found = traits(case)
            missing = {(name, holds) for name in found for holds in (True, False)} if missing is None else missing
            missing -= found.items()

        collect()
        if not missing:
            break
    assert missing == set()


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from((torch.float32, torch.bfloat16, FP8)))
def test_a_pool_holds_nan_exactly_where_no_row_has_business(case: Case, pages_dtype: torch.dtype) -> None:
    inputs = case.inputs(torch.float32, pages_dtype)
    stray = ~case.covered()
    assert stray.any() and not any(stray[slot] for row in range(len(case.positions)) for slot in case.visible(row))
    for values in (inputs.keys(), inputs.values()):
        assert torch.equal(values.isnan(), stray[..., None, None].expand_as(values))
    assert inputs.q.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(cases(), st.data())
def test_rows_that_are_kept_see_what_they_saw(case: Case, data: st.DataObject) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, len(case.positions) - 1))))
    kept = case.keep(rows)
    assert [kept.visible(i) for i in range(len(rows))] == [case.visible(row) for row in rows]
    plan, want = case.plan().of_rows(rows), kept.plan()
    for name in ("position", "page_ptr", "pages", "length", "key_begin", "row_begin", "row_end"):
        assert torch.equal(getattr(plan, name), getattr(want, name))
    assert all(np.array_equal(got, column) for got, column in zip(plan.columns, want.columns, strict=True))
    assert plan.num_rows == len(rows)
