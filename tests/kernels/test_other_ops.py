"""The five small operations agree with their formulas, written here in float64, for every dtype and odd shapes.

Unless a test says otherwise, the error allowed is one rounding of the exact result to its dtype plus a few float32 roundings.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from whispers_kernels import embed_rows, pool_logits, rms_norm, rope_and_store, silu_mul

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_rounded_once(actual: Tensor, exact: Tensor, size: Tensor | None = None) -> None:
    """Half a unit in the last place, plus eight float32 (float64) roundings of numbers of this `size` (default: the result's)."""
    info = torch.finfo(actual.dtype)
    inner = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps / 2
    bound = info.eps / 2 * exact.abs() + 8 * inner * (exact if size is None else size).abs() + info.smallest_normal * info.eps
    assert exact.dtype == torch.float64 and actual.shape == exact.shape
    excess = (actual.double() - exact).abs() - bound
    assert bool((excess <= 0).all()), f"beyond the budget by {excess.max()}"


# --- embed_rows --------------------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("soft_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary, hidden", [(1, 1), (7, 5), (65, 33)])
def test_embed_rows(dtype: torch.dtype, soft_dtype: torch.dtype | None, vocabulary: int, hidden: int) -> None:
    table = normal(vocabulary, 2 * hidden, dtype=dtype)[:, ::2]
    soft = None if soft_dtype is None else normal(3, hidden, dtype=soft_dtype, seed=1)
    both = table if soft is None else torch.cat((table, soft.to(dtype)))
    ids = [0, vocabulary - 1, len(both) - 1, min(vocabulary, len(both) - 1), 0]
    out = embed_rows(torch.tensor(ids), table, soft, impl="reference")
    assert out.dtype == dtype and torch.equal(out, torch.stack([both[i] for i in ids]))
    assert embed_rows(torch.tensor([], dtype=torch.int64), table, soft, impl="reference").shape == (0, hidden)


# --- rms_norm ----------------------------------------------------------------------------------------------------------------------


def rms_norm_exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean_square = (x.double() ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return x.double() / torch.sqrt(mean_square + eps) * weight.double()


@every_dtype
@pytest.mark.parametrize("layout", ["dense", "every other column", "transposed"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 20), (3, 33), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(dtype: torch.dtype, layout: str, shape: tuple[int, ...], eps: float) -> None:
    def make(seed: int) -> Tensor:
        if layout == "every other column":
            return normal(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=seed)[..., ::2]
        if layout == "transposed":
            return normal(*shape[:-2], shape[-1], shape[-2], dtype=dtype, seed=seed).mT
        return normal(*shape, dtype=dtype, seed=seed)

    x, residual, weight = make(0), make(1), normal(shape[-1], dtype=dtype, seed=2)
    x[0] = 0
    out = rms_norm(x, weight, eps, impl="reference")
    assert out.dtype == dtype
    assert_rounded_once(out, rms_norm_exact(x, weight, eps))

    out, total = rms_norm(x, weight, eps, residual, impl="reference")
    assert out.dtype == total.dtype == dtype
    assert_rounded_once(total, x.double() + residual.double())
    assert_rounded_once(out, rms_norm_exact(total, weight, eps))  # of the sum as it is returned, rounded


def test_rms_norm_takes_a_weight_of_another_dtype() -> None:
    x, weight = normal(4, 9, dtype=torch.bfloat16), normal(9, dtype=torch.float32, seed=1)
    out = rms_norm(x, weight, 1e-5, impl="reference")
    assert out.dtype == torch.bfloat16
    assert_rounded_once(out, rms_norm_exact(x, weight, 1e-5))


# --- rope_and_store ----------------------------------------------------------------------------------------------------------------

POSITIONS = torch.tensor([0, 1, -1, -17, 3000, -4000, 12])
SLOTS = torch.tensor([7, -1, 0, 14, 5, -1, 2])  # of 5 pages of 3; -1: not stored


def angles(positions: Tensor, dim: int) -> Tensor:
    return positions.double()[:, None] * 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))


def rotated(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of x as one complex number, times e^(i theta); and that number's modulus, the size of every product in it."""
    first, second = x.double().chunk(2, dim=-1)
    z = torch.complex(first, second) * torch.polar(torch.ones_like(theta), theta)[:, None]
    return torch.cat((z.real, z.imag), dim=-1), torch.cat((z.abs(), z.abs()), dim=-1)


def rope(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, slots: Tensor, *pools: Tensor) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k_pages, v_pages, *scales = pools
    k_scale, v_scale = scales or (None, None)
    cos, sin = theta.cos().to(wide), theta.sin().to(wide)
    return rope_and_store(q, k, v, cos, sin, slots, k_pages, v_pages, k_scale=k_scale, v_scale=v_scale, impl="reference")


def inputs(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a model has them: slices of one matrix."""
    qkv = normal(len(POSITIONS), heads + 2 * kv_heads, dim, dtype=dtype)
    return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]


def assert_only_written(after: Tensor, before: Tensor, slots: Tensor) -> None:
    """Bit for bit, so NaN equals NaN."""
    after, before = after.flatten(0, 1).clone().view(torch.uint8), before.flatten(0, 1).clone().view(torch.uint8)
    untouched = [slot for slot in range(after.shape[0]) if slot not in slots.tolist()]
    assert torch.equal(after[untouched], before[untouched])


@every_dtype
@pytest.mark.parametrize("heads, kv_heads, dim", [(1, 1, 2), (3, 1, 10), (4, 2, 16), (5, 5, 34)])
def test_rope_and_store(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    q, k, v = inputs(dtype, heads, kv_heads, dim)
    before = torch.full((5, 3, kv_heads, dim), NAN, dtype=dtype)
    k_pages, v_pages = before.clone(), before.clone()
    out = rope(q, k, v, angles(POSITIONS, dim), SLOTS, k_pages, v_pages)
    assert out.dtype == dtype
    assert_rounded_once(out, *rotated(q, angles(POSITIONS, dim)))
    kept = SLOTS >= 0
    exact, size = rotated(k, angles(POSITIONS, dim))
    assert_rounded_once(k_pages.flatten(0, 1)[SLOTS[kept]], exact[kept], size[kept])
    assert torch.equal(v_pages.flatten(0, 1)[SLOTS[kept]], v[kept])
    assert_only_written(k_pages, before, SLOTS)
    assert_only_written(v_pages, before, SLOTS)


@every_dtype
def test_rope_and_store_into_fp8_pages(dtype: torch.dtype) -> None:
    """e4m3 has three bits of mantissa (a relative error of 2^-4) down to a step of 2^-9 (an error of 2^-10 scales)."""
    q, k, v = inputs(dtype, 4, 2, 16)
    v[0, 0] = 0  # its scale must not be 0
    v[2, 0, 1:] *= 1e-3  # below the smallest normal number beside the first entry
    before, scale_before = torch.full((5, 3, 2, 16), NAN).to(FP8), torch.full((5, 3, 2), NAN)
    pools = [before.clone(), before.clone(), scale_before.clone(), scale_before.clone()]
    rope(q, k, v, angles(POSITIONS, 16), SLOTS, *pools)
    kept = SLOTS >= 0
    k_exact, size = rotated(k, angles(POSITIONS, 16))
    k_error = torch.finfo(dtype).eps / 2 * k_exact.abs() + 1e-6 * size  # k is rounded to its dtype before it is stored
    for exact, error, store, scales in ((k_exact, k_error, pools[0], pools[2]), (v.double(), 0 * k_error, pools[1], pools[3])):
        exact, error = exact[kept], error[kept]
        scale = scales.flatten(0, 1)[SLOTS[kept]].double()[..., None]
        largest = exact.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(scale, torch.where(largest > 0, largest / 448, 1.0), rtol=torch.finfo(dtype).eps + 1e-6, atol=0)
        back = store.flatten(0, 1)[SLOTS[kept]].double() * scale
        assert bool(((back - exact).abs() <= 1.001 * torch.maximum(exact.abs() / 16, scale / 1024) + error).all())
        assert_only_written(store, before, SLOTS)
        assert_only_written(scales, scale_before, SLOTS)


def test_storing_what_fp8_pages_hold_changes_nothing() -> None:
    q, k, v = inputs(torch.float32, 4, 2, 16)
    slots, still = torch.arange(7), torch.zeros(7, 8)
    first = [torch.zeros(3, 3, 2, 16).to(FP8), torch.zeros(3, 3, 2, 16).to(FP8), torch.zeros(3, 3, 2), torch.zeros(3, 3, 2)]
    second = [pool.clone() for pool in first]
    rope(q, k, v, angles(POSITIONS, 16), slots, *first)
    k, v = ((first[i].float() * first[i + 2][..., None]).flatten(0, 1)[:7] for i in (0, 1))
    rope(q, k, v, still, slots, *second)
    for i in (0, 1):
        assert torch.equal(first[i].view(torch.uint8), second[i].view(torch.uint8))
        torch.testing.assert_close(first[i + 2], second[i + 2], rtol=1e-6, atol=0)


def test_rotating_back_and_relative_positions() -> None:
    """Rotation by -p undoes rotation by p, and a score depends on the difference of two positions only: -17 is a position like any."""
    q, k, v = inputs(torch.float64, 4, 4, 16)
    pages = torch.zeros(5, 3, 4, 16, dtype=torch.float64)
    theta, nowhere = angles(POSITIONS, 16), torch.full_like(SLOTS, -1)
    there = rope(q, k, v, theta, nowhere, pages, pages.clone())
    torch.testing.assert_close(rope(there, k, v, -theta, nowhere, pages, pages.clone()), q, rtol=0, atol=1e-12)
    assert not pages.any()

    def scores(shift: int) -> Tensor:
        moved = [rope(x, k, v, angles(POSITIONS + shift, 16), nowhere, pages, pages) for x in (q, k)]
        return torch.einsum("rhd,shd->hrs", *moved)

    torch.testing.assert_close(scores(0), scores(-5000), rtol=0, atol=1e-10)


# --- silu_mul ----------------------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("rows, width", [(0, 4), (1, 1), (5, 7), (3, 129)])
def test_silu_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = normal(rows, 4 * width, dtype=dtype)[:, ::2] * 3
    gate_up[:1, 0], gate_up[-1:, 0] = 60, -60
    out = silu_mul(gate_up, impl="reference")
    assert out.dtype == dtype
    gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
    assert_rounded_once(out, gate / (1 + torch.exp(-gate)) * up)


# --- pool_logits -------------------------------------------------------------------------------------------------------------------


def pool_exact(logits: Tensor, weights: Tensor, bounds: list[int], rule: str) -> Tensor:
    """Token by token with Python's floats; a token of probability 0 has log-probability -inf."""

    def log(x: float) -> float:
        return math.log(x) if x > 0 else -INF

    rows = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        asked = [(w, logits[r].double().exp().tolist()) for r, w in enumerate(weights.tolist()) if begin <= r < end and w > 0]
        shares = [(w, [x / sum(row) for x in row]) for w, row in asked]
        tokens = range(logits.shape[1])
        if rule == "mixture":
            rows.append([log(sum(w * p[t] for w, p in shares)) for t in tokens])
        else:
            powers = [math.exp(sum(w * log(p[t]) for w, p in shares)) for t in tokens]
            rows.append([log(x) - log(sum(powers)) if x > 0 else -INF for x in powers])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(bounds) - 1, logits.shape[1])


def pooled(logits: Tensor, weights: list[float], bounds: list[int], rule: str) -> Tensor:
    """The result, checked against `pool_exact`; a log-probability is off by a few float32 roundings of itself or 1."""
    shares = torch.tensor(weights)
    out = pool_logits(logits, shares, torch.tensor(bounds, dtype=torch.int32), rule, impl="reference")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), pool_exact(logits, shares, bounds, rule), rtol=1e-6, atol=2e-6)
    return out


every_rule = pytest.mark.parametrize("rule", ["mixture", "product"])


@every_dtype
@every_rule
@pytest.mark.parametrize("vocabulary", [1, 7, 257])
def test_pool_logits_of_several_groups(dtype: torch.dtype, rule: str, vocabulary: int) -> None:
    logits = normal(6, 2 * vocabulary, dtype=dtype)[:, ::2] * 4
    out = pooled(logits, [0.25, 0.75, 1.0, 0.5, 0.0, 0.5], [0, 2, 3, 6], rule)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(3))


@every_rule
@pytest.mark.parametrize("value", [-INF, NAN])
def test_a_row_of_weight_0_is_left_out_whatever_it_holds(rule: str, value: float) -> None:
    logits = normal(3, 5)
    without = pooled(logits[::2], [0.25, 0.75], [0, 2], rule)
    logits[1] = value
    assert torch.equal(pooled(logits, [0.25, 0.0, 0.75], [0, 3], rule), without)


@every_rule
def test_one_expert_or_identical_experts_are_their_own_pool(rule: str) -> None:
    logits = normal(1, 9, dtype=torch.float32)
    alone = pooled(logits, [1.0], [0, 1], rule)
    torch.testing.assert_close(alone, logits.log_softmax(-1))
    torch.testing.assert_close(pooled(logits.expand(3, -1), [0.2, 0.3, 0.5], [0, 3], rule), alone)


@every_dtype
def test_a_token_ruled_out_by_one_expert(dtype: torch.dtype) -> None:
    logits = normal(2, 4, dtype=dtype)
    logits[0, 1] = logits[:, 2] = -INF
    assert pooled(logits, [0.5, 0.5], [0, 2], "mixture").isfinite().tolist() == [[True, True, False, True]]
    assert pooled(logits, [0.5, 0.5], [0, 2], "product").isfinite().tolist() == [[True, False, False, True]]


def test_a_product_that_rules_every_token_out_is_minus_infinity_throughout() -> None:
    logits = torch.tensor([[0.0, -INF, 1.0], [-INF, 0.0, -INF], [1.0, 2.0, 3.0]])
    out = pool_logits(logits, torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0, 2, 3], dtype=torch.int32), "product", impl="reference")
    assert out[0].tolist() == [-INF] * 3
    torch.testing.assert_close(out[1], logits[2].log_softmax(-1))
    assert pooled(logits[:2], [0.5, 0.5], [0, 2], "mixture").isfinite().all()


@every_rule
def test_no_groups(rule: str) -> None:
    assert pooled(normal(0, 3), [], [0], rule).shape == (0, 3)
