"""The four stateless operations agree with their formulas, written here in float64, for every implementation, dtype and odd shapes.

Unless a test says otherwise, the error allowed is one rounding of the exact result to its dtype plus a few float32 roundings.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.kernels.impls import device_of, every_impl, every_impl_and_dtype, every_kernel, far_apart, poison
from tests.kernels.rounding import assert_rounded_once, normal
from whispers_kernels import embed_rows, pool_logits, rms_norm, rope_and_store, silu_mul

INF, NAN = math.inf, math.nan
every_rule = pytest.mark.parametrize("rule", ["mixture", "product"])
# The interpreter computes with numpy, which warns of the infinities that the kernels make and handle.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


# --- embed_rows --------------------------------------------------------------------------------------------------------------------


@every_impl_and_dtype
@pytest.mark.parametrize("soft_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary, hidden", [(1, 1), (7, 5), (65, 33)])
def test_embed_rows(
    impl: str, dtype: torch.dtype, soft_dtype: torch.dtype | None, vocabulary: int, hidden: int
) -> None:
    device = device_of(impl)
    table = normal(vocabulary, 2 * hidden, dtype=dtype, device=device)[:, ::2]
    soft = None if soft_dtype is None else normal(3, hidden, dtype=soft_dtype, seed=1, device=device)
    both = table if soft is None else torch.cat((table, soft.to(dtype)))
    ids = [0, vocabulary - 1, len(both) - 1, min(vocabulary, len(both) - 1), 0]
    out = embed_rows(torch.tensor(ids, device=device), table, soft, impl=impl)
    assert out.dtype == dtype and out.is_contiguous() and torch.equal(out, torch.stack([both[i] for i in ids]))
    nothing = torch.tensor([], dtype=torch.int64, device=device)
    assert embed_rows(nothing, table, soft, impl=impl).shape == (0, hidden)


@every_impl
def test_embed_rows_wider_than_a_block_with_strided_ids(impl: str) -> None:
    """Some blocks of a row, and ids that are every other number of a tensor."""
    device = device_of(impl)
    table, soft = normal(3, 4100, device=device).half(), normal(2, 4100, seed=1, device=device).half()
    ids = torch.tensor([4, 0, 1, 0, 3, 0], device=device)[::2]
    out = embed_rows(ids, table, soft, impl=impl)
    assert torch.equal(out, torch.stack((soft[1], table[1], soft[0])))


# --- rms_norm ----------------------------------------------------------------------------------------------------------------------


def rms_norm_exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean_square = (x.double() ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return x.double() / torch.sqrt(mean_square + eps) * weight.double()


@every_impl_and_dtype
@pytest.mark.parametrize("layout", ["dense", "every other column", "every other row", "transposed"])
@pytest.mark.parametrize("shape, eps", [((1, 1), 0.5), ((5, 20), 1e-6), ((3, 33), 0.5), ((2, 3, 7), 1e-6)], ids=str)
def test_rms_norm(impl: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...], eps: float) -> None:
    device = device_of(impl)

    def make(seed: int) -> Tensor:
        if layout == "every other column":
            return normal(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=seed, device=device)[..., ::2]
        if layout == "every other row":  # a part of a wider matrix, as a model's q and k are
            return normal(*shape[:-2], 2 * shape[-2], shape[-1], dtype=dtype, seed=seed, device=device)[..., ::2, :]
        if layout == "transposed":
            return normal(*shape[:-2], shape[-1], shape[-2], dtype=dtype, seed=seed, device=device).mT
        return normal(*shape, dtype=dtype, seed=seed, device=device)

    x, residual, weight = make(0), make(1), normal(shape[-1], dtype=dtype, seed=2, device=device)
    x[0] = 0
    like_x = torch.empty_like(x).stride()
    out = rms_norm(x, weight, eps, impl=impl)
    assert isinstance(out, Tensor) and out.dtype == dtype and (out.stride() == like_x or x.numel() == 1)
    assert_rounded_once(out, rms_norm_exact(x, weight, eps))

    out, total = rms_norm(x, weight, eps, residual, impl=impl)
    assert out.dtype == total.dtype == dtype and (out.stride() == total.stride() == like_x or x.numel() == 1)
    assert_rounded_once(total, x.double() + residual.double())
    assert_rounded_once(out, rms_norm_exact(total, weight, eps))  # of the sum as it is returned, rounded


@every_impl
def test_rms_norm_takes_a_weight_of_another_dtype(impl: str) -> None:
    device = device_of(impl)
    x, weight = normal(4, 9, dtype=torch.float16, device=device), normal(18, seed=1, device=device).float()[::2]
    out = rms_norm(x, weight, 1e-5, impl=impl)
    assert isinstance(out, Tensor) and out.dtype == torch.float16
    assert_rounded_once(out, rms_norm_exact(x, weight, 1e-5))


@every_impl
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (2, 1, 3, 8), (70, 64), (2, 8200)], ids=str)
def test_rms_norm_of_any_number_of_dimensions_and_rows(impl: str, shape: tuple[int, ...]) -> None:
    """None, one, some blocks of rows, and a width that takes the most threads."""
    device = device_of(impl)
    x, residual = (normal(*shape, dtype=torch.float32, seed=seed, device=device) for seed in (0, 1))
    weight = normal(shape[-1], dtype=torch.float32, seed=2, device=device)
    out, total = rms_norm(x, weight, 1e-6, residual, impl=impl)
    assert_rounded_once(total, x.double() + residual.double())
    assert_rounded_once(out, rms_norm_exact(total, weight, 1e-6))


# --- silu_mul ----------------------------------------------------------------------------------------------------------------------


@every_impl_and_dtype
@pytest.mark.parametrize("rows, width", [(0, 4), (1, 1), (5, 7), (3, 129), (2, 1030)])
def test_silu_mul(impl: str, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = normal(rows, 4 * width, dtype=dtype, device=device_of(impl))[:, ::2].mul_(3)
    gate_up[:1, 0], gate_up[-1:, 0] = 60, -60
    out = silu_mul(gate_up, impl=impl)
    assert out.dtype == dtype and out.is_contiguous()
    gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
    assert_rounded_once(out, gate / (1 + torch.exp(-gate)) * up)


@every_impl
def test_silu_mul_of_every_size_of_gate(impl: str) -> None:
    """To a few roundings from where the exponential is lost beside 1 to where it is all there is; beyond that as the definition."""
    gate = torch.cat((torch.linspace(-80, 80, 999), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30])))
    out = silu_mul(torch.cat((gate, torch.ones_like(gate)))[None].to(device_of(impl)), impl=impl)
    assert_rounded_once(out[0], gate.double() / (1 + torch.exp(-gate.double())))
    gate = torch.tensor([INF, -INF, NAN, -1e30])
    out = silu_mul(torch.cat((gate, torch.ones_like(gate)))[None].to(device_of(impl)), impl=impl)
    torch.testing.assert_close(out[0].cpu(), torch.tensor([INF, NAN, NAN, 0.0]), equal_nan=True)


# --- pool_logits -------------------------------------------------------------------------------------------------------------------


def pool_exact(logits: Tensor, weights: Tensor, bounds: list[int], rule: str) -> Tensor:
    """Token by token with Python's floats; a token of probability 0 has log-probability -inf."""

    def log(x: float) -> float:
        return math.log(x) if x > 0 else -INF

    rows = []
    for begin, end in itertools.pairwise(bounds):
        asked = [
            (w, logits[r].double().exp().tolist()) for r, w in enumerate(weights.tolist()) if begin <= r < end and w > 0
        ]
        shares = [(w, [x / sum(row) for x in row]) for w, row in asked]
        tokens = range(logits.shape[1])
        if rule == "mixture":
            rows.append([log(sum(w * p[t] for w, p in shares)) for t in tokens])
        else:
            powers = [math.exp(sum(w * log(p[t]) for w, p in shares)) for t in tokens]
            rows.append([log(x) - log(sum(powers)) if x > 0 else -INF for x in powers])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(bounds) - 1, logits.shape[1])


def pooled(logits: Tensor, weights: list[float], bounds: list[int], rule: str, impl: str) -> Tensor:
    """The result, checked against `pool_exact`; a log-probability is off by a few float32 roundings of itself or 1."""
    shares = torch.tensor(weights)
    out = unchecked(logits, shares, bounds, rule, impl)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), pool_exact(logits.cpu(), shares, bounds, rule), rtol=1e-6, atol=2e-6)
    return out


def unchecked(logits: Tensor, weights: Tensor, bounds: list[int], rule: str, impl: str) -> Tensor:
    """The result of `impl` where it runs; float64 logits are for those that take them."""
    device = device_of(impl)
    logits = (logits.float() if impl != "reference" and logits.dtype == torch.float64 else logits).to(device)
    group_ptr = torch.tensor(bounds, dtype=torch.int32, device=device)
    return pool_logits(logits, weights.to(device), group_ptr, rule, impl=impl).cpu()


@every_impl_and_dtype
@every_rule
@pytest.mark.parametrize("vocabulary", [1, 7, 257])
def test_pool_logits_of_several_groups(impl: str, dtype: torch.dtype, rule: str, vocabulary: int) -> None:
    logits = normal(6, 2 * vocabulary, dtype=dtype, device=device_of(impl))[:, ::2].mul_(4)
    out = pooled(logits, [0.25, 0.75, 1.0, 0.5, 0.0, 0.5], [0, 2, 3, 6], rule, impl)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(3))


@every_impl
@every_rule
def test_pool_logits_of_a_large_vocabulary_and_many_members(impl: str, rule: str) -> None:
    """More tokens than a chunk, more members than are read at a time, and chunks that hold nothing but -inf or most of the sum."""
    logits = normal(9, 9001, dtype=torch.float32) * 4
    logits[:, 4096:8192] = -INF
    logits[3, 8999] = 60.0
    pooled(logits, [0.125, 0.125, 0.0, 0.25, 0.125, 0.25, 0.125, 1.0, 0.0], [0, 7, 9], rule, impl)


@every_impl
@every_rule
def test_logits_with_a_common_offset_pool_as_without(impl: str, rule: str) -> None:
    logits = (normal(3, 50) * 4).round().float()
    out = [
        unchecked(logits + offset, torch.tensor([0.25, 0.5, 0.25]), [0, 3], rule, impl)
        for offset in (0, 2**14, -(2**14))
    ]
    for other in out[1:]:
        torch.testing.assert_close(out[0], other, rtol=1e-6, atol=2e-6)


@every_impl
@every_rule
@pytest.mark.parametrize("value", [-INF, INF, NAN])
def test_a_row_of_weight_0_is_left_out_whatever_it_holds(impl: str, rule: str, value: float) -> None:
    logits = normal(3, 5, dtype=torch.float32)
    without = pooled(logits[::2], [0.25, 0.75], [0, 2], rule, impl)
    logits[1] = value
    assert torch.equal(pooled(logits, [0.25, 0.0, 0.75], [0, 3], rule, impl), without)


@every_impl
@every_rule
@pytest.mark.parametrize("values", [[NAN], [INF], [-INF] * 5], ids=str)
def test_logits_that_are_no_distribution_spoil_their_group_alone(impl: str, rule: str, values: list[float]) -> None:
    logits = normal(3, 5, dtype=torch.float32)
    logits[1, : len(values)] = torch.tensor(values)
    out = unchecked(logits, torch.tensor([0.5, 0.5, 1.0]), [0, 2, 3], rule, impl)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], logits[2].log_softmax(-1))


@every_impl
@every_rule
def test_one_expert_or_identical_experts_are_their_own_pool(impl: str, rule: str) -> None:
    logits = normal(1, 9, dtype=torch.float32)
    alone = pooled(logits, [1.0], [0, 1], rule, impl)
    torch.testing.assert_close(alone, logits.log_softmax(-1))
    torch.testing.assert_close(pooled(logits.expand(3, -1), [0.2, 0.3, 0.5], [0, 3], rule, impl), alone)


@every_impl
def test_a_mixture_keeps_probabilities_that_float32_does_not_hold(impl: str) -> None:
    logits = torch.tensor([[0.0, -200.0], [0.0, -300.0]])
    out = unchecked(logits, torch.tensor([0.5, 0.5]), [0, 2], "mixture", impl)
    torch.testing.assert_close(out, torch.tensor([[0.0, -200.0 - math.log(2)]]))


@every_impl_and_dtype
def test_a_token_ruled_out_by_one_expert(impl: str, dtype: torch.dtype) -> None:
    logits = normal(2, 4, dtype=dtype)
    logits[0, 1] = logits[:, 2] = -INF
    assert pooled(logits, [0.5, 0.5], [0, 2], "mixture", impl).isfinite().tolist() == [[True, True, False, True]]
    assert pooled(logits, [0.5, 0.5], [0, 2], "product", impl).isfinite().tolist() == [[True, False, False, True]]


@every_impl
def test_a_product_that_rules_every_token_out_is_minus_infinity_throughout(impl: str) -> None:
    logits = torch.tensor([[0.0, -INF, 1.0], [-INF, 0.0, -INF], [1.0, 2.0, 3.0]])
    out = unchecked(logits, torch.tensor([0.5, 0.5, 1.0]), [0, 2, 3], "product", impl)
    assert out[0].tolist() == [-INF] * 3
    torch.testing.assert_close(out[1], logits[2].log_softmax(-1))
    assert pooled(logits[:2], [0.5, 0.5], [0, 2], "mixture", impl).isfinite().all()


@every_impl
@every_rule
def test_no_groups_and_groups_of_nobody(impl: str, rule: str) -> None:
    assert pooled(normal(0, 3), [], [0], rule, impl).shape == (0, 3)
    nobody = [-INF] * 3 if rule == "mixture" else [-math.log(3)] * 3
    for rows in (0, 2):
        out = unchecked(normal(rows, 3).float(), torch.zeros(rows), [0, 0, rows], rule, impl)
        torch.testing.assert_close(out, torch.tensor([nobody, nobody]))


# --- all four ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["embed_rows", "rms_norm", "add_rms_norm", "silu_mul", "mixture", "product"])
@every_impl_and_dtype
def test_a_row_has_the_same_bits_in_any_company(impl: str, dtype: torch.dtype, operation: str) -> None:
    """Row by row, or group by group, alone."""
    device = device_of(impl)
    x, weight = normal(7, 70, dtype=dtype, device=device), normal(70, dtype=dtype, seed=1, device=device)
    ids = torch.tensor([3, 0, 8, 6, 7, 1, 1], device=device)

    def run(begin: int, end: int) -> Tensor:
        if operation == "embed_rows":
            return embed_rows(ids[begin:end], x, x.float(), impl=impl)
        if operation == "silu_mul":
            return silu_mul(x[begin:end], impl=impl)
        if operation in ("mixture", "product"):
            one_each = torch.arange(end - begin + 1, dtype=torch.int32, device=device)
            return pool_logits(x[begin:end], torch.ones(end - begin, device=device), one_each, operation, impl=impl)
        residual = x.flip(0)[begin:end] if operation == "add_rms_norm" else None
        out = rms_norm(x[begin:end], weight, 1e-6, residual, impl=impl)
        return out if isinstance(out, Tensor) else torch.cat(out, dim=1)

    together = run(0, 7)
    for row in range(7):
        assert torch.equal(run(row, row + 1)[0], together[row])


@every_impl
def test_rows_beyond_2_31_elements(impl: str) -> None:
    """An embedding table, a long prefill, many rows of logits."""
    device = device_of(impl)
    rows = normal(3, 8, dtype=torch.float16)
    far, near = far_apart(rows, device), rows.to(device)
    ids, weight = torch.tensor([2, 0, 1], device=device), torch.ones(8, device=device)
    assert torch.equal(embed_rows(ids, far, None, impl=impl), near[ids])
    one, other = rms_norm(far, weight, 1e-6, impl=impl), rms_norm(near, weight, 1e-6, impl=impl)
    assert isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    one, other = rms_norm(far, weight, 1e-6, far, impl=impl), rms_norm(near, weight, 1e-6, near, impl=impl)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(silu_mul(far, impl=impl), silu_mul(near, impl=impl))
    for rule in ("mixture", "product"):
        shares, ends = torch.tensor([1.0, 0.25, 0.75], device=device), torch.tensor([0, 1, 3], device=device).int()
        assert torch.equal(
            pool_logits(far, shares, ends, rule, impl=impl), pool_logits(near, shares, ends, rule, impl=impl)
        )


@every_kernel
@pytest.mark.parametrize(
    "operation", ["embed_rows", "rms_norm", "add_rms_norm", "rope_and_store", "silu_mul", "pool_logits"]
)
def test_a_kernel_refuses_float64_and_does_not_fall_back(operation: str, impl: str) -> None:
    device = device_of(impl)
    x, one = normal(2, 4, device=device), torch.ones(1, dtype=torch.int32, device=device)
    heads, slots = x[:, None], torch.tensor([0, 1], device=device)
    with pytest.raises(ValueError, match=rf"impl='{impl}': float64 .* accepted: float32, bfloat16, float16"):
        if operation == "embed_rows":
            embed_rows(slots, x.float(), x, impl=impl)
        elif operation == "rms_norm":
            rms_norm(x.float(), x[0], 1e-6, impl=impl)
        elif operation == "add_rms_norm":
            rms_norm(x, x[0].float(), 1e-6, x, impl=impl)
        elif operation == "rope_and_store":
            pages = torch.zeros(1, 2, 1, 4, device=device)
            rope_and_store(*[heads.float()] * 3, x[:, :2], x[:, 2:], slots, pages, pages, impl=impl)
        elif operation == "silu_mul":
            silu_mul(x, impl=impl)
        else:
            pool_logits(x, torch.ones(2, device=device), torch.cat((0 * one, 2 * one)), "mixture", impl=impl)
