"""`rope_and_store` turns pairs as complex numbers do, at any position, and writes the slots it is given and nothing else.

Rotated values may be off by one rounding to their dtype plus a few float32 roundings; fp8 pages add the rounding of e4m3.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.rounding import assert_rounded_once, every_dtype, normal
from whispers_kernels import rope_and_store

FP8 = torch.float8_e4m3fn
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
    return rope_and_store(
        q, k, v, cos, sin, slots, k_pages, v_pages, k_scale=k_scale, v_scale=v_scale, impl="reference"
    )


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
    before = torch.full((5, 3, kv_heads, dim), math.nan, dtype=dtype)
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


@pytest.mark.parametrize("pages_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_rope_and_store_into_pages_of_another_dtype(pages_dtype: torch.dtype) -> None:
    """The keys are rounded to their own dtype first: what is stored is what `q` would be."""
    _, k, v = inputs(torch.float32, 2, 2, 16)
    k_pages, v_pages = torch.zeros(2, 3, 3, 2, 16, dtype=pages_dtype)
    keys = rope(k, k, v, angles(POSITIONS, 16), torch.arange(7), k_pages, v_pages)
    assert torch.equal(k_pages.flatten(0, 1)[:7], keys.to(pages_dtype))
    assert torch.equal(v_pages.flatten(0, 1)[:7], v.to(pages_dtype))


@every_dtype
def test_rope_and_store_into_fp8_pages(dtype: torch.dtype) -> None:
    """e4m3 has three bits of mantissa (a relative error of 2^-4) down to a step of 2^-9 (an error of 2^-10 scales)."""
    q, k, v = inputs(dtype, 4, 2, 16)
    v[0, 0] = 0  # its scale must not be 0
    v[2, 0, 1:] *= 1e-3  # below the smallest normal number beside the first entry
    before, scale_before = torch.full((5, 3, 2, 16), math.nan).to(FP8), torch.full((5, 3, 2), math.nan)
    pools = [before.clone(), before.clone(), scale_before.clone(), scale_before.clone()]
    rope(q, k, v, angles(POSITIONS, 16), SLOTS, *pools)
    kept = SLOTS >= 0
    k_exact, size = rotated(k, angles(POSITIONS, 16))
    k_error = torch.finfo(dtype).eps / 2 * k_exact.abs() + 1e-6 * size  # k is rounded to its dtype before it is stored
    for exact, error, store, scales in (
        (k_exact, k_error, pools[0], pools[2]),
        (v.double(), 0 * k_error, pools[1], pools[3]),
    ):
        exact, error = exact[kept], error[kept]
        scale = scales.flatten(0, 1)[SLOTS[kept]].double()[..., None]
        largest = exact.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(
            scale, torch.where(largest > 0, largest / 448, 1.0), rtol=torch.finfo(dtype).eps + 1e-6, atol=0
        )
        back = store.flatten(0, 1)[SLOTS[kept]].double() * scale
        assert bool(((back - exact).abs() <= 1.001 * torch.maximum(exact.abs() / 16, scale / 1024) + error).all())
        assert_only_written(store, before, SLOTS)
        assert_only_written(scales, scale_before, SLOTS)


def test_storing_what_fp8_pages_hold_changes_nothing() -> None:
    q, k, v = inputs(torch.float32, 4, 2, 16)
    slots, still = torch.arange(7), torch.zeros(7, 8)
    pages, scales = torch.zeros(3, 3, 2, 16).to(FP8), torch.zeros(3, 3, 2)
    first = [pages, pages.clone(), scales, scales.clone()]
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
