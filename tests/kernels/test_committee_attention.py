"""`committee_attention` is the softmax over the union of what a row sees, whatever computes it.

Every implementation agrees with a loop over rows and keys in float64, for random plans and every option: the reference to 1e-10 in
float64, all of them within twice the error of PyTorch's own attention in the other dtypes. Keys that no segment names are NaN here, and
so is new memory: a stray read shows, and so does a result that is not written. That a kernel's row has the same bits in any company:
at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.impls import device_of, every_impl, every_impl_and_dtype, every_kernel, untouched, with_kernels
from tests.kernels.plans import FP8, Case, Inputs, cases, options, schedule_constants
from whispers_kernels import Plan, Segment, available_impls, committee_attention, ops
from whispers_kernels.plan import FixedPlan
from whispers_kernels.schedule import last_boundary, lay_out
from whispers_kernels.verify_checks import new_memory_is_nan

EPS32 = torch.finfo(torch.float32).eps
INF = math.inf
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
needs_triton = pytest.mark.skipif("triton" not in available_impls(), reason="needs triton")
# The interpreter computes with numpy, which warns of the infinities that a kernel makes and handles.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def on_random(number: int, impl: str, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Runs the decorated test at once on so many examples; on a fifth where each takes an interpreter long, or a GPU a compilation."""
    few = settings(
        max_examples=number if impl == "reference" else number // 5,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    return lambda test: few(given(*strategies)(test))()


def attend(
    case: Case, inputs: Inputs, impl: str = "reference", plan: Plan | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """The operation where `impl` runs; the plan is the case's unless another is given. Results are on the CPU."""
    device = device_of(impl)
    q, k_pages, v_pages, k_scale, v_scale = (None if tensor is None else tensor.to(device) for tensor in inputs)
    assert q is not None and k_pages is not None and v_pages is not None
    plan = case.plan(device) if plan is None else plan
    keywords |= {"k_scale": k_scale, "v_scale": v_scale, "return_lse": True, "impl": impl}
    with new_memory_is_nan():
        out, lse = committee_attention(q, k_pages, v_pages, plan, **keywords)
    assert out.dtype == inputs.q.dtype and out.shape == inputs.q.shape
    assert lse.dtype == torch.float32 and lse.shape == inputs.q.shape[:2]
    return out.cpu(), lse.cpu()


def gather(case: Case, pool: Tensor, seen: list[tuple[int, int]]) -> Tensor:
    """`[Hq, K, D]`: the keys or values of what a row sees, for each of its heads."""
    pages, offsets = zip(*seen, strict=True)
    return pool[list(pages), list(offsets)].transpose(0, 1).repeat_interleave(case.group, dim=0)


def direct(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query, written out, in the dtype of its arguments: `[Hq, D]` and the scores `[Hq, K]`."""
    scores = (q[:, None] * k).sum(-1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shares = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (shares[..., None] * v).sum(1) / shares.sum(-1, keepdim=True), scores


def oracle(
    case: Case, inputs: Inputs, scale: float | None = None, window: int | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """One row at a time in float64: the result, its log-sum-exp, and the largest score."""
    q, k_pages, v_pages = inputs.q.double(), inputs.keys(), inputs.values()
    out, lse, largest = torch.zeros_like(q), torch.full(q.shape[:2], -INF, dtype=torch.float64), 0.0
    for row in range(len(case.positions)):
        if seen := case.visible(row, window):
            k, v = gather(case, k_pages, seen), gather(case, v_pages, seen)
            out[row], scores = direct(q[row], k, v, case.dim**-0.5 if scale is None else scale, softcap)
            lse[row] = scores.exp().sum(-1).log()
            largest = max(largest, scores.abs().max().item())
    return out, lse, largest


def pytorch_error(
    case: Case,
    inputs: Inputs,
    exact: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> float:
    """How far PyTorch's own attention is off, on the same keys in q's dtype. It has no softcap: there, plain softmax."""
    q, worst = inputs.q, 0.0
    k_pages, v_pages = inputs.keys().to(q.dtype), inputs.values().to(q.dtype)
    for row in range(len(case.positions)):
        if seen := case.visible(row, window):
            k, v = gather(case, k_pages, seen), gather(case, v_pages, seen)
            if softcap is None:
                out = F.scaled_dot_product_attention(q[row, :, None], k, v, scale=scale)[:, 0]
            else:
                out = direct(q[row], k, v, case.dim**-0.5 if scale is None else scale, softcap)[0]
            worst = max(worst, (out.double() - exact[row]).abs().max().item())
    return worst


def check(case: Case, inputs: Inputs, impl: str, keywords: dict[str, Any]) -> None:
    """The error budget. Its rounding band: one rounding of the result to its dtype, and four float32 roundings of a score or of 1."""
    out, lse = attend(case, inputs, impl, **keywords)
    exact, exact_lse, score = oracle(case, inputs, **keywords)
    value = inputs.values().nan_to_num().abs().max().item()
    band = torch.finfo(out.dtype).eps / 2 * exact.abs().max().item() + 4 * EPS32 * (1 + score) * value
    error = (out.double() - exact).abs().max().item()
    assert error <= 2 * pytorch_error(case, inputs, exact, **keywords) + band
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=8 * EPS32 * (1 + score))
    assert not out[exact_lse[:, 0] == -INF].any()  # rows that see nothing


def test_float64_agrees_to_1e_10() -> None:
    @on_random(100, "reference", cases(), options())
    def agrees(case: Case, keywords: dict[str, Any]) -> None:
        out, lse = attend(case, case.inputs(torch.float64), **keywords)
        exact, exact_lse, _ = oracle(case, case.inputs(torch.float64), **keywords)
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-10)
        torch.testing.assert_close(lse, exact_lse.float(), rtol=EPS32, atol=1e-10)
        blind = torch.tensor([not case.visible(row, keywords["window"]) for row in range(len(case.positions))])
        assert torch.equal(out[blind], torch.zeros_like(out[blind])) and bool((lse[blind] == -INF).all())
        assert bool(lse[~blind].isfinite().all())


@every_impl_and_dtype
def test_error_is_within_twice_pytorchs(impl: str, dtype: torch.dtype) -> None:
    @on_random(40, impl, cases(), options())
    def within(case: Case, keywords: dict[str, Any]) -> None:
        check(case, case.inputs(dtype), impl, keywords)


@every_impl_and_dtype
def test_fp8_pages_count_as_their_dequantised_values(impl: str, dtype: torch.dtype) -> None:
    @on_random(20, impl, cases(), options())
    def within(case: Case, keywords: dict[str, Any]) -> None:
        check(case, case.inputs(dtype, FP8), impl, keywords)


@every_impl_and_dtype
def test_a_row_that_sees_one_key(impl: str, dtype: torch.dtype) -> None:
    """Its weight is 2^(score - score), where one of both is rounded: an exponential that is rough beside 0 shows in the log-sum-exp."""
    for seed in range(16):
        case = Case((Segment([0], 1, 0, 0, 1),), (0,), page_size=1, num_pages=1, group=1, kv_heads=1, dim=4, seed=seed)
        check(case, case.inputs(dtype), impl, {})


@needs_triton
def test_bfloat16_and_fp8_meet_in_float16() -> None:
    """Interpreted too, though results are cut to bfloat16 there, not rounded."""

    @on_random(15, "triton", cases(), options())
    def within(case: Case, keywords: dict[str, Any]) -> None:
        check(case, case.inputs(BF16, FP8), "triton", keywords)


@every_impl
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fp8_scales_and_q_may_be_far_from_one(impl: str, dtype: torch.dtype) -> None:
    """A power of two in both, and its inverse in the scores' scale, change nothing; one in the values' scales is the result's.

    And one in the scale of a row's last key is nothing to the rows before it.
    """
    case = step(page_size=5, context=90, rows=[*prefill(90, 7), (95, 6)], group=3)
    inputs = case.inputs(dtype, FP8)
    assert inputs.k_scale is not None and inputs.v_scale is not None
    _, context, *_ = case.segments
    inputs.v_scale[context.pages[:6]] *= 2.0**-12  # not all alike
    inputs.v_scale[context.pages[6:8]] = 0
    out, lse = attend(case, inputs, impl, scale=0.25)
    assert out.isfinite().all()
    for power in (2.0**-30, 2.0**25):
        more = inputs._replace(q=inputs.q * power, k_scale=inputs.k_scale * power, v_scale=inputs.v_scale * power)
        scaled, scaled_lse = attend(case, more, impl, scale=0.25 / power**2)
        assert torch.equal(scaled, out * power) and torch.equal(scaled_lse, lse)
    last = 90 - 1  # seen by the last row of the prefill, and by the branch
    inputs.v_scale[context.pages[last // 5], last % 5] *= 2.0**30
    after, _ = attend(case, inputs, impl, scale=0.25)
    assert torch.equal(after[:6], out[:6]) and not bool((after[6:] == out[6:]).any())


@pytest.mark.parametrize("pages_dtype", [FP8, BF16, F32])
def test_pages_of_another_dtype_lose_nothing(pages_dtype: torch.dtype) -> None:
    @on_random(20, "reference", cases(), options())
    def agrees(case: Case, keywords: dict[str, Any]) -> None:
        inputs = case.inputs(torch.float64, pages_dtype)
        out, _ = attend(case, inputs, **keywords)
        torch.testing.assert_close(out, oracle(case, inputs, **keywords)[0], rtol=0, atol=1e-10)


@every_impl
@pytest.mark.parametrize("dtype, pages_dtype", [(F32, F16), (F16, F32)])
def test_q_and_pages_may_differ(impl: str, dtype: torch.dtype, pages_dtype: torch.dtype) -> None:
    @on_random(15, impl, cases(), options())
    def within(case: Case, keywords: dict[str, Any]) -> None:
        check(case, case.inputs(dtype, pages_dtype), impl, keywords)


def test_a_row_does_not_depend_on_its_neighbours_but_for_rounding() -> None:
    """The reference's matrix products round by their shape. Kernels' do not: see the end."""

    @on_random(40, "reference", cases(), options(), st.data())
    def close(case: Case, keywords: dict[str, Any], data: st.DataObject) -> None:
        keywords["scale"] = None  # scores near 1, so that 1e-6 is a few roundings
        inputs, rows = case.inputs(F32), draw_rows(case, data)
        out, _ = attend(case, inputs, **keywords)
        alone, found = alone_and_among_nan(case, inputs, rows, "reference", keywords)
        torch.testing.assert_close(alone, found, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[0], out[rows])


def draw_rows(case: Case, data: st.DataObject) -> list[int]:
    return sorted(data.draw(st.sets(st.integers(0, len(case.positions) - 1), min_size=1, max_size=5)))


def alone_and_among_nan(
    case: Case, inputs: Inputs, rows: list[int], impl: str, keywords: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Result and log-sum-exp of these rows in a step without the others, and in the whole step with NaN for the others' queries."""
    alone = attend(case.keep(rows), inputs._replace(q=inputs.q[rows]), impl, **keywords)
    others = torch.full_like(inputs.q, math.nan).index_copy_(0, torch.tensor(rows), inputs.q[rows])
    out, lse = attend(case, inputs._replace(q=others), impl, **keywords)
    return alone, (out[rows], lse[rows])


# With q = 0 every key has the same share, so a result is the mean of the values seen and exp(lse) their number. Values: 1, 2, 3, ...
CONTEXT, TWICE = Segment([0], 2, 0, 0, 2), Segment([1], 2, 2, 0, 1)
BY_HAND: dict[str, tuple[list[Segment], list[int], dict[str, Any], list[list[int]]]] = {
    "two experts": (
        [CONTEXT, Segment([1], 2, 2, 0, 1), Segment([2], 1, 2, 1, 2)],
        [3, 2],
        {},
        [[1, 2, 3, 4], [1, 2, 5]],
    ),
    "causal": ([Segment([0, 1], 4, 0, 0, 3)], [0, 1, 3], {}, [[1], [1, 2], [1, 2, 3, 4]]),
    "a soft prompt in front": ([CONTEXT, Segment([2], 2, -2, 0, 1)], [0, 0], {}, [[1, 5, 6], [1]]),
    "named twice counts twice": ([CONTEXT, TWICE, TWICE], [2, 2], {}, [[1, 2, 3, 3], [1, 2]]),
    "a window of 2": ([CONTEXT, TWICE], [3, 1], {"window": 2}, [[3, 4], [1, 2]]),
    "a window of 1": ([CONTEXT, TWICE], [2, 5], {"window": 1}, [[3], []]),
    "nothing to see": ([CONTEXT], [-1, 0, 7], {}, [[], [1], []]),
    "no segment": ([], [0], {}, [[]]),
    "no key": ([Segment([1], 0, 0, 0, 1)], [0], {}, [[]]),
    "no row": ([Segment([0], 2, 0, 0, 0)], [], {}, []),
}


@every_impl
@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str, impl: str) -> None:
    segments, positions, keywords, seen = BY_HAND[name]
    pages = torch.arange(1.0, 9.0).reshape(4, 2, 1, 1)
    inputs = Inputs(torch.zeros(len(positions), 2, 1), pages, pages)
    out, lse = attend(Case(tuple(segments), tuple(positions), 2, 4), inputs, impl, **keywords)
    for row, values in enumerate(seen):
        assert out[row].flatten().tolist() == pytest.approx([sum(values) / max(len(values), 1)] * 2)
        assert lse[row].exp().tolist() == pytest.approx([len(values)] * 2)


@every_impl
def test_without_return_lse_the_result_comes_alone(impl: str) -> None:
    device = device_of(impl)
    q, pages = torch.zeros(2, 2, 1, device=device), torch.arange(1.0, 9.0, device=device).reshape(4, 2, 1, 1)
    plan = Plan.from_segments([CONTEXT, TWICE], [3, 1], device)
    out, _ = committee_attention(q, pages, pages, plan, return_lse=True, impl=impl)
    alone = committee_attention(q, pages, pages, plan, impl=impl)
    assert isinstance(alone, Tensor) and torch.equal(alone, out)


@every_impl
@pytest.mark.parametrize("infinite", [math.nan, INF, -INF])
def test_a_neighbours_nan_stays_its_own(infinite: float, impl: str) -> None:
    """Two rows share a page; one of them sees another page that is not finite. The other's result is what it is alone."""
    pages = torch.ones(3, 2, 1, 4)
    values = pages.clone()
    values[1] = infinite
    case = Case((Segment([0], 2, 0, 0, 2), Segment([1], 1, 2, 0, 1), Segment([2], 1, 2, 1, 2)), (2, 2), 2, 3)
    out, _ = attend(case, Inputs(torch.ones(2, 1, 4), pages, values), impl)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], torch.ones(1, 4))


def test_a_later_keys_nan_is_not_an_earlier_rows() -> None:
    """Of the reference. A compiled kernel may make NaN of such rows: 0 * NaN in a matrix product."""
    values = torch.ones(1, 4, 1, 4)
    values[0, 2:] = math.nan
    case = Case((Segment([0], 4, 0, 0, 4),), (0, 1, 2, 3), 4, 1)
    out, _ = attend(case, Inputs(torch.ones(4, 1, 4), torch.ones(1, 4, 1, 4), values))
    torch.testing.assert_close(out[:2], torch.ones(2, 1, 4))
    assert out[2:].isnan().all()


@every_impl
def test_a_window_beyond_all_positions_hides_nothing(impl: str) -> None:
    pages = torch.ones(1, 2, 1, 4)
    case = Case((Segment([0], 2, 0, 0, 1),), (1,), 2, 1)
    out, _ = attend(case, Inputs(torch.ones(1, 1, 4), pages, pages), impl, window=2**40)
    torch.testing.assert_close(out, torch.ones(1, 1, 4))


@every_impl
def test_tensors_may_be_slices_of_others(impl: str) -> None:
    """q of the matrix that holds k and v too, or with its heads first; keys and values of one pool."""
    case = step(page_size=7, context=20, rows=[(row, 0) for row in range(20)])
    inputs = case.inputs(F32)
    expected = attend(case, inputs, impl)
    fused = torch.full((20, 2 * case.group + 5, 16), math.nan)
    fused[:, 3 : 3 + 2 * case.group] = inputs.q
    pool = torch.stack((inputs.k_pages, inputs.v_pages), dim=1)
    sliced = inputs._replace(k_pages=pool[:, 0], v_pages=pool[:, 1])
    for q in (fused[:, 3 : 3 + 2 * case.group], inputs.q.transpose(0, 1).contiguous().transpose(0, 1)):
        assert all(map(torch.equal, attend(case, sliced._replace(q=q), impl), expected))
    strided = torch.stack((inputs.q, inputs.q), dim=-1)[..., 0]
    assert all(map(torch.equal, attend(case, inputs._replace(q=strided), impl), expected))


@every_impl
@pytest.mark.parametrize("page_size", [4, 64])
def test_pages_may_lie_beyond_what_32_bits_count(page_size: int, impl: str) -> None:
    """The first and the last of three pages, 2^31 entries apart, each stride within 32 bits."""
    case = Case((Segment([2, 0], page_size + 3, 0, 0, 2),), (page_size + 1, page_size + 2), page_size, 3, dim=16)
    inputs = case.inputs(F16)
    far = untouched(2**31 + 16 * page_size, F16, device_of(impl)).as_strided((3, page_size, 1, 16), (2**30, 16, 16, 1))
    far.copy_(inputs.k_pages)
    near = attend(case, inputs._replace(v_pages=inputs.k_pages), impl)
    assert all(map(torch.equal, attend(case, inputs._replace(k_pages=far, v_pages=far), impl), near))


@needs_triton
def test_triton_refuses_what_it_does_not_compute() -> None:
    case = step(page_size=7, context=20, rows=prefill(20, 3))
    inputs, device = case.inputs(F32, FP8), device_of("triton")
    with pytest.raises(ValueError, match=r"impl='triton': float64 .* accepted: float32, bfloat16, float16"):
        attend(case, case.inputs(torch.float64), "triton")
    with pytest.raises(ValueError, match="impl='triton': float64"):
        attend(case, case.inputs(F32, torch.float64), "triton")
    wide = torch.zeros(*inputs.v_pages.shape[:3], 32).to(device, inputs.v_pages.dtype)
    with pytest.raises(ValueError, match=r"v_pages: strides .* accepted: those of k_pages"):
        attend(case, inputs._replace(v_pages=wide[..., :16]), "triton")
    assert inputs.v_scale is not None
    strided = torch.stack((inputs.v_scale, inputs.v_scale), dim=-1).to(device)[..., 0]
    with pytest.raises(ValueError, match=r"v_scale: strides .* accepted: a contiguous tensor"):
        attend(case, inputs._replace(v_scale=strided), "triton")


# --- longer steps, and a kernel's bits --------------------------------------------------------------------------------------------------


def step(page_size: int, context: int, rows: list[tuple[int, int]], group: int = 2) -> Case:
    """Rows `(position, own)` that all see 20 keys in front and a context, and behind it each its `own` keys; always in the same pool."""
    num_pages = -(-context // page_size) + 80
    free = iter(
        Random(context).sample(range(num_pages), num_pages)
    )  # neighbours in a segment are strangers in the pool

    def fresh(length: int) -> list[int]:
        return [next(free) for _ in range(-(-length // page_size))]

    segments = [Segment(fresh(20), 20, -20, 0, len(rows)), Segment(fresh(context), context, 0, 0, len(rows))]
    segments += [Segment(fresh(own), own, context, row, row + 1) for row, (_, own) in enumerate(rows) if own > 0]
    return Case(tuple(segments), tuple(position for position, _ in rows), page_size, num_pages, group, 2, 16)


def prefill(context: int, rows: int) -> list[tuple[int, int]]:
    return [(position, 0) for position in range(context - rows, context)]


def decode(context: int, rows: int) -> list[tuple[int, int]]:
    return [(context + own - 1, own) for own in (1 + 13 * row % 70 for row in range(rows))]


class Longer(NamedTuple):
    """A context of several ranges of keys."""

    dtype: torch.dtype
    pages_dtype: torch.dtype | None
    page_size: int
    context: int
    prefilled: int  # rows; enough of them to merge in place
    group: int
    keywords: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.prefilled} of {self.context}, {self.dtype}, {self.pages_dtype}, {self.keywords}"

    def step(self, rows: list[tuple[int, int]]) -> Case:
        return step(self.page_size, self.context, rows, self.group)


LONGER = [
    Longer(F16, None, 64, 2100, 64, 4, {}),
    Longer(F16, None, 50, 600, 300, 2, {"window": 100}),
    Longer(F16, FP8, 64, 300, 90, 3, {"softcap": 2.0}),
    Longer(F32, None, 64, 320, 12, 4, {"window": 270}),
]
IN_BF16 = [longer._replace(dtype=BF16) for longer in LONGER if longer.dtype == F16]  # not for an interpreter
MANY_ROWS = {"ROWS_IN_PLACE": 12}  # a GPU's or a CPU's prefill has more than these steps
every_longer_step = with_kernels("longer", {"triton": LONGER, "cpp": LONGER + IN_BF16})


@every_longer_step
def test_longer_steps_are_within_the_budget(impl: str, longer: Longer) -> None:
    case = longer.step(prefill(longer.context, longer.prefilled) + decode(longer.context, 5))
    inputs = case.inputs(longer.dtype, longer.pages_dtype)
    tile = ops.tile_rows(impl, inputs.q.dtype, inputs.k_pages.dtype, case.group, case.dim, device_of(impl))
    with schedule_constants(MANY_ROWS):
        assert tile is not None and case.plan().work(tile).in_place
        check(case, inputs, impl, longer.keywords)


@with_kernels("dtype", {"triton": [F16], "cpp": [F16, BF16]})
def test_a_branch_decodes_over_2700_keys_within_the_budget(impl: str, dtype: torch.dtype) -> None:
    case = step(64, 2700, decode(2700, 5))
    check(case, case.inputs(dtype), impl, {})


@with_kernels("dtype", {"cpp": [F32, F16, BF16]})
def test_a_row_merges_more_partial_results_than_a_vector_has_lanes(impl: str, dtype: torch.dtype) -> None:
    case = step(64, 1500, decode(1500, 5))
    inputs = case.inputs(dtype)
    with schedule_constants({"RANGE": 64}):
        assert lay_out(*case.plan().columns, 1).merge_ptr[1] > 16
        check(case, inputs, impl, {})
        merged = attend(case, inputs, impl)
    with schedule_constants({"RANGE": 64, "PARTIALS_AT_MOST": 0}):
        assert all(map(torch.equal, attend(case, inputs, impl), merged)), "in place"


@every_kernel
def test_a_random_rows_bits_do_not_depend_on_its_neighbours(impl: str) -> None:
    kinds = [(F32, None), (F16, None), (F16, FP8), (F32, FP8), (BF16, FP8), (F16, F32)]
    if impl == "cpp":
        kinds += [(BF16, None), (BF16, F16)]

    @on_random(30, impl, cases(), options(), st.sampled_from(kinds), st.data())
    def same(case: Case, keywords: dict[str, Any], kind: tuple[Any, Any], data: st.DataObject) -> None:
        alone, found = alone_and_among_nan(case, case.inputs(*kind), draw_rows(case, data), impl, keywords)
        assert all(map(torch.equal, alone, found))


@with_kernels("dtype", {"triton": [F16], "cpp": [F16, BF16]})
def test_random_steps_of_several_ranges(impl: str, dtype: torch.dtype) -> None:
    """Some of their rows merge in place, and others afterwards. ALIGN stays: it is a multiple of every kernel's tile."""

    @on_random(15, impl, cases((64, 70), (16,)), options(), st.data())
    def right(case: Case, keywords: dict[str, Any], data: st.DataObject) -> None:
        with schedule_constants({"RANGE": 64, "ROWS_IN_PLACE": 32, "PARTIALS_AT_MOST": 12}):
            inputs = case.inputs(dtype)
            check(case, inputs, impl, keywords)
            alone, found = alone_and_among_nan(case, inputs, draw_rows(case, data), impl, keywords)
            assert all(map(torch.equal, alone, found))


def companies(longer: Longer, probes: tuple[int, int]) -> dict[str, tuple[Case, list[int]]]:
    """Steps in which two rows at these positions see the context, and which rows they are."""
    others = decode(longer.context, 6)
    among = [*others[:4], (probes[0], 0), *others[4:], (probes[1], 0)]
    prefilled = prefill(longer.context, longer.prefilled)
    pair = longer.step([(position, 0) for position in probes])
    front, whole = pair.segments
    spare = tuple(s._replace(pages=[*s.pages, pair.num_pages - 1, 0]) for s in pair.segments)
    behind = tuple(s._replace(row_begin=3, row_end=5) for s in pair.segments)
    first = Segment(whole.pages, whole.length - 9, 3, 0, 3)  # another request, with the same keys elsewhere
    found = {
        "a prefill": (longer.step(prefilled), [prefilled.index((position, 0)) for position in probes]),
        "a decode": (longer.step(among), [4, 7]),
        "the other order": (replace(pair, positions=pair.positions[::-1]), [1, 0]),
        "pages to spare": (replace(pair, segments=spare), [0, 1]),
        "behind another request": (
            replace(pair, segments=(*behind[::-1], first), positions=(whole.length, 5, whole.length // 2, *probes)),
            [3, 4],
        ),
    }
    cut = last_boundary(probes[1])
    if cut % longer.page_size == 0:
        pages = cut // longer.page_size
        rest = whole._replace(pages=whole.pages[pages:], length=whole.length - cut, key_begin=cut)
        halves = (rest, front, whole._replace(pages=whole.pages[:pages], length=cut))
        found["a context in two segments"] = (replace(pair, segments=halves), [0, 1])
    return found


@every_longer_step
def test_a_row_has_the_same_bits_in_any_company(impl: str, longer: Longer) -> None:
    probes = (longer.context - longer.prefilled + 5, longer.context - 1)
    q = torch.randn(2, 2 * longer.group, 16, generator=torch.Generator().manual_seed(1)).to(longer.dtype)

    def bits(case: Case, rows: list[int], plan: Plan | None = None) -> tuple[Tensor, Tensor]:
        """Of the two rows at the two positions."""
        inputs = case.inputs(longer.dtype, longer.pages_dtype)
        inputs.q[rows] = q
        out, lse = attend(case, inputs, impl, plan, **longer.keywords)
        return out[rows], lse[rows]

    pair = longer.step([(position, 0) for position in probes])
    expected = bits(pair, [0, 1])
    assert all(found.isfinite().all() for found in expected)
    for row in range(2):
        inputs = pair.inputs(longer.dtype, longer.pages_dtype)._replace(q=q[[row]])
        alone = attend(pair.keep([row]), inputs, impl, **longer.keywords)
        assert all(map(torch.equal, alone, (found[[row]] for found in expected))), f"row {row} alone"
    for name, (case, rows) in companies(longer, probes).items():
        with schedule_constants(MANY_ROWS):
            company = bits(case, rows)
        assert all(map(torch.equal, company, expected)), name
    with schedule_constants({"PARTIALS_AT_MOST": 0}):
        assert all(map(torch.equal, bits(pair, [0, 1]), expected)), "merged in place"
    plan = pair.plan(device_of(impl))
    longer_keys = plan.columns._replace(length=plan.columns.length + 300)
    assert all(map(torch.equal, bits(pair, [0, 1], replace(plan, columns=longer_keys, _work={})), expected)), (
        "keys to come"
    )


@every_kernel
def test_a_plan_that_moves_on_gives_the_bits_of_a_plan_made_anew(impl: str) -> None:
    """Of capacity to spare, and cut for the keys to come. A smaller plan in the same memory leaves nothing of the one before."""
    rows, device = 8, device_of(impl)
    tile = ops.tile_rows(impl, F32, F32, 2, 16, device)
    fixed = FixedPlan(rows, 20, 60, 40, 60, 100, 100, tile, device)

    def steps(begin: int, owns: list[int], number: int, known: int) -> None:
        """So many decode steps of branches behind a context, each by one key longer than the one before; `known` rows are scheduled."""
        for taken in range(number):
            grown = [own + taken for own in owns]
            case = step(64, begin, [(begin + own - 1, 256) for own in grown])
            segments = [
                *case.segments[:2],
                *(s._replace(length=own) for s, own in zip(case.segments[2:], grown, strict=True)),
            ]
            case = replace(case, segments=tuple(segments))
            inputs = case.inputs(F32)
            if taken == 0:
                plan = case.plan()
                length = plan.columns.length.copy()
                length[2:] = 256
                position = np.resize(plan.columns.position, known)
                made = None if tile is None else lay_out(*plan.columns._replace(position=position, length=length), tile)
                assert fixed.load(plan, made, range(2, len(segments)))
            q = torch.cat((inputs.q, inputs.q.new_full((rows - len(owns), *inputs.q.shape[1:]), 1.0)))
            out, lse = attend(case, inputs._replace(q=q), impl, fixed)
            expected = attend(case, inputs, impl)
            assert all(map(torch.equal, (out[: len(owns)], lse[: len(owns)]), expected)), taken
            nothing = slice(len(owns), known)
            assert not out[nothing].any() and bool((lse[nothing] == -INF).all())
            fixed.advance()

    steps(300, [1, 63, 191, 200], 2, known=rows)
    steps(64, [1, 5], 2, known=2)
