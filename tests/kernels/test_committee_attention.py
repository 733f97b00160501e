"""`committee_attention` is the softmax over the union of what a row sees.

The reference agrees with a loop over rows and keys in float64, to 1e-10 in float64 and within twice the error of PyTorch's own
attention in the other dtypes, for random plans and every option. Keys that no segment names are NaN here, so a stray read shows.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.plans import FP8, Case, Inputs, cases, options
from whispers_kernels import Plan, Segment, committee_attention

EPS32 = torch.finfo(torch.float32).eps
INF = math.inf


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def attend(case: Case, inputs: Inputs, **keywords: Any) -> tuple[Tensor, Tensor]:
    out, lse = committee_attention(
        inputs.q,
        inputs.k_pages,
        inputs.v_pages,
        case.plan(),
        k_scale=inputs.k_scale,
        v_scale=inputs.v_scale,
        return_lse=True,
        impl="reference",
        **keywords,
    )
    assert out.dtype == inputs.q.dtype and out.shape == inputs.q.shape
    assert lse.dtype == torch.float32 and lse.shape == inputs.q.shape[:2]
    return out, lse


def gather(case: Case, pool: Tensor, row: int, window: int | None) -> Tensor:
    """`[Hq, K, D]`: what each head of `row` sees."""
    seen = [pool[page, offset] for page, offset in case.visible(row, window)]
    return torch.stack(seen, dim=1).repeat_interleave(case.group, dim=0)


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
        if case.visible(row, window):
            k, v = gather(case, k_pages, row, window), gather(case, v_pages, row, window)
            out[row], scores = direct(q[row], k, v, case.dim**-0.5 if scale is None else scale, softcap)
            lse[row] = scores.exp().sum(-1).log()
            largest = max(largest, scores.abs().max().item())
    return out, lse, largest


def pytorch_error(
    case: Case, inputs: Inputs, exact: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> float:
    """How far PyTorch's own attention is off, on the same keys in q's dtype. It has no softcap: there, plain softmax."""
    q, worst = inputs.q, 0.0
    k_pages, v_pages = inputs.keys().to(q.dtype), inputs.values().to(q.dtype)
    for row in range(len(case.positions)):
        if case.visible(row, window):
            k, v = gather(case, k_pages, row, window), gather(case, v_pages, row, window)
            if softcap is None:
                out = F.scaled_dot_product_attention(q[row, :, None], k, v, scale=scale)[:, 0]
            else:
                out = direct(q[row], k, v, case.dim**-0.5 if scale is None else scale, softcap)[0]
            worst = max(worst, (out.double() - exact[row]).abs().max().item())
    return worst


def check(case: Case, inputs: Inputs, keywords: dict[str, Any]) -> None:
    """The error budget. Its rounding band: one rounding of the result to its dtype, and four float32 roundings of a score or of 1."""
    out, lse = attend(case, inputs, **keywords)
    exact, exact_lse, score = oracle(case, inputs, **keywords)
    value = inputs.values().nan_to_num().abs().max().item()
    band = torch.finfo(out.dtype).eps / 2 * exact.abs().max().item() + 4 * EPS32 * (1 + score) * value
    error = (out.double() - exact).abs().max().item()
    assert error <= 2 * pytorch_error(case, inputs, exact, **keywords) + band
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=8 * EPS32 * (1 + score))


@examples(100)
@given(cases(), options())
def test_float64_agrees_to_1e_10(case: Case, keywords: dict[str, Any]) -> None:
    out, lse = attend(case, case.inputs(torch.float64), **keywords)
    exact, exact_lse, _ = oracle(case, case.inputs(torch.float64), **keywords)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, exact_lse.float(), rtol=EPS32, atol=1e-10)
    blind = torch.tensor([not case.visible(row, keywords["window"]) for row in range(len(case.positions))])
    assert torch.equal(out[blind], torch.zeros_like(out[blind])) and bool((lse[blind] == -INF).all())
    assert bool(lse[~blind].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@examples(40)
@given(cases(), options())
def test_error_is_within_twice_pytorchs(dtype: torch.dtype, case: Case, keywords: dict[str, Any]) -> None:
    check(case, case.inputs(dtype), keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@examples(20)
@given(cases(), options())
def test_fp8_pages_count_as_their_dequantised_values(dtype: torch.dtype, case: Case, keywords: dict[str, Any]) -> None:
    check(case, case.inputs(dtype, FP8), keywords)


@pytest.mark.parametrize("pages_dtype", [FP8, torch.bfloat16, torch.float32])
@examples(20)
@given(cases(), options())
def test_pages_of_another_dtype_lose_nothing(pages_dtype: torch.dtype, case: Case, keywords: dict[str, Any]) -> None:
    inputs = case.inputs(torch.float64, pages_dtype)
    out, _ = attend(case, inputs, **keywords)
    torch.testing.assert_close(out, oracle(case, inputs, **keywords)[0], rtol=0, atol=1e-10)


@examples(40)
@given(cases(), options(), st.data())
def test_a_row_does_not_depend_on_its_neighbours(case: Case, keywords: dict[str, Any], data: st.DataObject) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, len(case.positions) - 1), min_size=1, max_size=5)))
    inputs = case.inputs(torch.float32)
    keywords["scale"] = None  # scores near 1, so that 1e-6 is a few roundings
    out, lse = attend(case, inputs, **keywords)
    alone = case.keep(rows)
    alone_out, alone_lse = attend(alone, alone.inputs(torch.float32)._replace(q=inputs.q[rows]), **keywords)
    torch.testing.assert_close(alone_out, out[rows], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone_lse, lse[rows], rtol=1e-6, atol=1e-6)
    others = torch.full_like(inputs.q, math.nan).index_copy_(0, torch.tensor(rows), inputs.q[rows])
    assert torch.equal(attend(case, inputs._replace(q=others), **keywords)[0][rows], out[rows])


# With q = 0 every key has the same share, so a result is the mean of the values seen and exp(lse) their number. Values: 1, 2, 3, ...
CONTEXT, TWICE = Segment([0], 2, 0, 0, 2), Segment([1], 2, 2, 0, 1)
BY_HAND: dict[str, tuple[list[Segment], list[int], dict[str, int], list[list[int]]]] = {
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


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    segments, positions, keywords, seen = BY_HAND[name]
    pages = torch.arange(1.0, 9.0).reshape(4, 2, 1, 1)
    inputs = Inputs(torch.zeros(len(positions), 2, 1), pages, pages)
    out, lse = attend(Case(tuple(segments), tuple(positions), 2, 4), inputs, **keywords)
    for row, values in enumerate(seen):
        assert out[row].flatten().tolist() == pytest.approx([sum(values) / max(len(values), 1)] * 2)
        assert lse[row].exp().tolist() == pytest.approx([len(values)] * 2)


def test_without_return_lse_the_result_comes_alone() -> None:
    q, pages = torch.zeros(2, 2, 1), torch.arange(1.0, 9.0).reshape(4, 2, 1, 1)
    plan = Plan.from_segments([CONTEXT, TWICE], [3, 1])
    out, _ = committee_attention(q, pages, pages, plan, return_lse=True, impl="reference")
    alone = committee_attention(q, pages, pages, plan, impl="reference")
    assert isinstance(alone, Tensor) and torch.equal(alone, out)


def test_a_neighbours_nan_stays_its_own() -> None:
    """Two rows share a page; one of them sees another page of NaN. The other's result is what it is alone."""
    pages = torch.ones(3, 2, 1, 4)
    values = pages.clone()
    values[1] = math.nan
    plan = Plan.from_segments([([0], 2, 0, 0, 2), ([1], 1, 2, 0, 1), ([2], 1, 2, 1, 2)], [2, 2])
    out = committee_attention(torch.ones(2, 1, 4), pages, values, plan, impl="reference")
    assert isinstance(out, torch.Tensor)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], torch.ones(1, 4))


def test_a_window_beyond_all_positions_hides_nothing() -> None:
    pages = torch.ones(1, 2, 1, 4)
    plan = Plan.from_segments([([0], 2, 0, 0, 1)], [1])
    out = committee_attention(torch.ones(1, 1, 4), pages, pages, plan, window=2**40, impl="reference")
    torch.testing.assert_close(out, torch.ones(1, 1, 4))
