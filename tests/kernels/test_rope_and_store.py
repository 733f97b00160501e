"""`rope_and_store` turns pairs as complex numbers do, at any position, and writes the slots it is given and nothing else.

Rotated values may be off by one rounding to their dtype plus a few float32 roundings; fp8 pages add the rounding of e4m3.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.impls import device_of, dtypes_of, every_impl, every_impl_and_dtype, poison, untouched
from tests.kernels.rounding import assert_rounded_once, normal
from whispers_kernels import rope_and_store

FP8 = torch.float8_e4m3fn
POSITIONS = torch.tensor([0, 1, -1, -17, 3000, -4000, 12])
SLOTS = torch.tensor([7, -1, 0, 14, 5, -1, 2])  # of 5 pages of 3; -1: not stored


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def angles(positions: Tensor, dim: int) -> Tensor:
    return positions.double()[:, None] * 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))


def rotated(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of x as one complex number, times e^(i theta); and that number's modulus, the size of every product in it."""
    first, second = x.double().cpu().chunk(2, dim=-1)
    z = torch.complex(first, second) * torch.polar(torch.ones_like(theta), theta)[:, None]
    return torch.cat((z.real, z.imag), dim=-1), torch.cat((z.abs(), z.abs()), dim=-1)


def rope(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, slots: Tensor, *pools: Tensor, impl: str) -> Tensor:
    """All but q, k and v may be on the CPU; pools that are not where `impl` runs are written there and copied back."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    device = device_of(impl)
    there = [pool.to(device) for pool in pools]
    k_pages, v_pages, *scales = there
    k_scale, v_scale = scales or (None, None)
    cos, sin = theta.cos().to(device, wide), theta.sin().to(device, wide)
    out = rope_and_store(
        q, k, v, cos, sin, slots.to(device), k_pages, v_pages, k_scale=k_scale, v_scale=v_scale, impl=impl
    )
    for pool, written in zip(pools, there, strict=True):
        pool.copy_(written)
    return out


def inputs(impl: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a model has them: slices of one matrix."""
    qkv = normal(len(POSITIONS), heads + 2 * kv_heads, dim, dtype=dtype, device=device_of(impl))
    return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]


def assert_only_written(after: Tensor, before: Tensor, slots: Tensor) -> None:
    """Bit for bit, so NaN equals NaN."""
    after, before = after.flatten(0, 1).clone().view(torch.uint8), before.flatten(0, 1).clone().view(torch.uint8)
    untouched = [slot for slot in range(after.shape[0]) if slot not in slots.tolist()]
    assert torch.equal(after[untouched], before[untouched])


@every_impl_and_dtype
@pytest.mark.parametrize("heads, kv_heads, dim", [(1, 1, 2), (3, 1, 10), (4, 2, 16), (5, 5, 34), (40, 20, 96)])
def test_rope_and_store(impl: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    q, k, v = inputs(impl, dtype, heads, kv_heads, dim)
    before = torch.full((5, 3, kv_heads, dim), math.nan, dtype=dtype)
    k_pages, v_pages = before.clone(), before.clone()
    out = rope(q, k, v, angles(POSITIONS, dim), SLOTS, k_pages, v_pages, impl=impl)
    assert out.dtype == dtype and out.is_contiguous()
    assert_rounded_once(out, *rotated(q, angles(POSITIONS, dim)))
    kept = SLOTS >= 0
    exact, size = rotated(k, angles(POSITIONS, dim))
    assert_rounded_once(k_pages.flatten(0, 1)[SLOTS[kept]], exact[kept], size[kept])
    assert torch.equal(v_pages.flatten(0, 1)[SLOTS[kept]], v.cpu()[kept])
    assert_only_written(k_pages, before, SLOTS)
    assert_only_written(v_pages, before, SLOTS)


@every_impl_and_dtype
def test_rope_and_store_into_pages_of_another_dtype(impl: str, dtype: torch.dtype) -> None:
    """The keys are rounded to their own dtype first: what is stored is what `q` would be."""
    _, k, v = inputs(impl, dtype, 2, 2, 16)
    for pages_dtype in dtypes_of(impl):
        k_pages, v_pages = torch.zeros(2, 3, 3, 2, 16, dtype=pages_dtype)
        keys = rope(k, k, v, angles(POSITIONS, 16), torch.arange(7), k_pages, v_pages, impl=impl)
        assert torch.equal(k_pages.flatten(0, 1)[:7], keys.cpu().to(pages_dtype))
        assert torch.equal(v_pages.flatten(0, 1)[:7], v.cpu().to(pages_dtype))


@every_impl_and_dtype
def test_rope_and_store_into_fp8_pages(impl: str, dtype: torch.dtype) -> None:
    """e4m3 has three bits of mantissa (a relative error of 2^-4) down to a step of 2^-9 (an error of 2^-10 scales)."""
    q, k, v = inputs(impl, dtype, 4, 2, 16)
    v[0, 0] = 0  # its scale must not be 0
    v[2, 0, 1:] *= 1e-3  # below the smallest normal number beside the first entry
    before, scale_before = torch.full((5, 3, 2, 16), math.nan).to(FP8), torch.full((5, 3, 2), math.nan)
    pools = [before.clone(), before.clone(), scale_before.clone(), scale_before.clone()]
    rope(q, k, v, angles(POSITIONS, 16), SLOTS, *pools, impl=impl)
    kept = SLOTS >= 0
    k_exact, size = rotated(k, angles(POSITIONS, 16))
    k_error = torch.finfo(dtype).eps / 2 * k_exact.abs() + 1e-6 * size  # k is rounded to its dtype before it is stored
    for exact, error, store, scales in (
        (k_exact, k_error, pools[0], pools[2]),
        (v.double().cpu(), 0 * k_error, pools[1], pools[3]),
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


@every_impl
def test_fp8_pages_hold_the_nearest_number(impl: str) -> None:
    """Every number of e4m3, every midpoint of two (ties to even), their neighbours and what is lost beside the largest."""
    exact = torch.arange(127, dtype=torch.uint8).view(FP8).float()  # 0 to 448
    middle = (exact[1:] + exact[:-1]) / 2
    several = torch.cat(
        (exact, middle, middle.nextafter(exact[1:]), middle.nextafter(exact[:-1]), torch.tensor([1e-30]))
    )
    several = torch.cat((several, -several)).float()
    v = torch.zeros(1, -(-len(several) // 15), 16)
    v[0, :, 1:] = torch.nn.functional.pad(several, (0, v[0, :, 1:].numel() - len(several))).view(-1, 15)
    v[0, :, 0] = 448  # the scale is 1
    pools = [torch.zeros(1, 2, v.shape[1], 16).to(FP8), torch.zeros(1, 2, v.shape[1], 16).to(FP8)]
    scales = [torch.zeros(1, 2, v.shape[1]), torch.zeros(1, 2, v.shape[1])]
    there = v.to(device_of(impl))
    rope(there, there, there, torch.zeros(1, 8), torch.tensor([1]), *pools, *scales, impl=impl)
    for pool, scale in zip(pools, scales, strict=True):
        assert torch.equal(scale[0, 1], torch.ones(v.shape[1]))
        # A rotation by no angle may turn -0 into 0.
        assert torch.equal(pool[0, 1].float(), v[0].to(FP8).float())


@every_impl
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
def test_fp8_pages_of_heads_without_a_scale(impl: str) -> None:
    """Not a number, infinite, or so small that it would be 0. What is beyond 448 is 448, infinity NaN, whatever torch makes of it."""
    inf, nan, least = math.inf, math.nan, 2.0**-149
    heads = [
        ([1.0, -2.0, inf, nan], 1.0, [1.0, -2.0, nan, nan]),
        ([nan, 500.0, -1e9, 448.0], 1.0, [nan, 448.0, -448.0, 448.0]),
        ([1.0, -inf, 0.0, 3.0], inf, [0.0, nan, 0.0, 0.0]),
        ([3e38, 1.0, -3e38, 1.5e38], float(torch.tensor(3e38) / 448), [448.0, 0.0, -448.0, 224.0]),
        ([least, 0.0, -least, 0.0], 1.0, [0.0] * 4),
        ([224 * least, 0.0, 0.0, 0.0], 1.0, [0.0] * 4),  # half of the least: to even
        ([671 * least, 100 * least, -671 * least, 0.0], least, [448.0, 96.0, -448.0, 0.0]),
        ([0.0, 0.0, -0.0, 0.0], 1.0, [0.0] * 4),
    ]
    v = torch.tensor([numbers for numbers, _, _ in heads])[None]
    k = torch.ones_like(v)
    pools = [*torch.zeros(2, 1, 2, len(heads), 4).to(FP8), *torch.zeros(2, 1, 2, len(heads))]
    there = [x.to(device_of(impl)) for x in (k, k, v)]
    rope(*there, torch.zeros(1, 2), torch.tensor([1]), *pools, impl=impl)
    assert pools[3][0, 1].tolist() == [scale for _, scale, _ in heads]
    expected = torch.tensor([numbers for _, _, numbers in heads])
    torch.testing.assert_close(pools[1][0, 1].float(), expected, rtol=0, atol=0, equal_nan=True)


@every_impl
def test_storing_what_fp8_pages_hold_changes_nothing(impl: str) -> None:
    q, k, v = inputs(impl, torch.float32, 4, 2, 16)
    slots, still = torch.arange(7), torch.zeros(7, 8)
    pages, scales = torch.zeros(3, 3, 2, 16).to(FP8), torch.zeros(3, 3, 2)
    first = [pages, pages.clone(), scales, scales.clone()]
    second = [pool.clone() for pool in first]
    rope(q, k, v, angles(POSITIONS, 16), slots, *first, impl=impl)
    k, v = ((first[i].float() * first[i + 2][..., None]).flatten(0, 1)[:7].to(q.device) for i in (0, 1))
    rope(q, k, v, still, slots, *second, impl=impl)
    for i in (0, 1):
        assert torch.equal(first[i].view(torch.uint8), second[i].view(torch.uint8))
        torch.testing.assert_close(first[i + 2], second[i + 2], rtol=1e-6, atol=0)


@every_impl
def test_rotating_back_and_relative_positions(impl: str) -> None:
    """Rotation by -p undoes rotation by p, and a score depends on the difference of two positions only: -17 is a position like any."""
    dtype, error = (torch.float64, 1e-12) if impl == "reference" else (torch.float32, 1e-6)
    q, k, v = inputs(impl, dtype, 4, 4, 16)
    pages = torch.zeros(5, 3, 4, 16, dtype=dtype)
    theta, nowhere = angles(POSITIONS, 16), torch.full_like(SLOTS, -1)
    there = rope(q, k, v, theta, nowhere, pages, pages.clone(), impl=impl)
    back = rope(there, k, v, -theta, nowhere, pages, pages.clone(), impl=impl)
    torch.testing.assert_close(back, q, rtol=0, atol=error)
    assert not pages.any()

    def scores(shift: int) -> Tensor:
        moved = [rope(x, k, v, angles(POSITIONS + shift, 16), nowhere, pages, pages, impl=impl) for x in (q, k)]
        return torch.einsum("rhd,shd->hrs", *(x.double() for x in moved))

    torch.testing.assert_close(scores(0), scores(-5000), rtol=0, atol=100 * error)


@every_impl
def test_inputs_of_any_layout(impl: str) -> None:
    """Columns and heads apart, angles and slots that are parts of something."""
    device = device_of(impl)
    q, k, v = inputs(impl, torch.float32, 4, 2, 16)
    theta = angles(POSITIONS, 16).float().to(device)
    cos, sin, slots = theta.cos(), theta.sin(), SLOTS.to(device)
    dense = [torch.zeros(5, 3, 2, 16, device=device) for _ in range(4)]
    expected = rope_and_store(q, k, v, cos, sin, slots, *dense[:2], impl=impl)

    def apart(x: Tensor) -> Tensor:
        """The same numbers, every other one along each dimension of a larger tensor."""
        larger = torch.full([2 * n for n in x.shape], 7, dtype=x.dtype, device=device)
        view = larger[tuple(slice(None, None, 2) for _ in x.shape)]
        return view.copy_(x)

    out = rope_and_store(*map(apart, (q, k, v, cos, sin, slots)), *dense[2:], impl=impl)
    assert torch.equal(out, expected) and torch.equal(dense[0], dense[2]) and torch.equal(dense[1], dense[3])
    none = rope_and_store(*(x[:0] for x in (q, k, v, cos, sin, slots)), *dense[2:], impl=impl)
    assert none.shape == (0, 4, 16) and torch.equal(dense[0], dense[2])


@every_impl_and_dtype
@pytest.mark.parametrize("fp8", [False, True])
def test_a_row_has_the_same_bits_in_any_company(impl: str, dtype: torch.dtype, fp8: bool) -> None:
    q, k, v = inputs(impl, dtype, 6, 3, 20)
    theta = angles(POSITIONS, 20)

    def pools() -> list[Tensor]:
        pages = [torch.zeros(5, 3, 3, 20, dtype=dtype).to(FP8 if fp8 else dtype) for _ in range(2)]
        return pages + [torch.zeros(5, 3, 3) for _ in range(2 if fp8 else 0)]

    together, alone = pools(), pools()
    out = rope(q, k, v, theta, SLOTS, *together, impl=impl)
    for row in range(len(SLOTS)):
        one = slice(row, row + 1)
        assert torch.equal(rope(q[one], k[one], v[one], theta[one], SLOTS[one], *alone, impl=impl), out[one])
    for pool, other in zip(together, alone, strict=True):
        assert torch.equal(pool.view(torch.uint8), other.view(torch.uint8))


@every_impl
def test_a_pool_of_more_than_2_31_elements(impl: str) -> None:
    device = device_of(impl)
    _, k, v = inputs(impl, torch.float16, 1, 1, 128)
    pages = 2**20 + 2  # of 16 keys of 128 numbers
    k_pages, v_pages = (untouched(pages * 2048, torch.float16, device).view(pages, 16, 1, 128) for _ in range(2))
    slots = (pages - 1) * 16 + torch.arange(7, device=device)
    theta = angles(POSITIONS, 128).float().to(device)
    keys = rope_and_store(k, k, v, theta.cos(), theta.sin(), slots, k_pages, v_pages, impl=impl)
    assert torch.equal(k_pages[-1, :7], keys) and torch.equal(v_pages[-1, :7], v)
    assert not k_pages[-1, 7:].any() and not k_pages[0].any()


def test_triton_refuses_pools_that_its_strides_do_not_fit() -> None:
    pytest.importorskip("triton")
    q, k, v = inputs("triton", torch.float32, 2, 2, 16)
    pages = torch.zeros(5, 3, 2, 16).to(q.device)
    other = torch.zeros(5, 3, 2, 32).to(q.device)[..., :16]
    with pytest.raises(ValueError, match=r"v_pages: strides .*accepted: those of k_pages"):
        rope_and_store(q, k, v, *torch.zeros(2, 7, 8).to(q.device), SLOTS.to(q.device), pages, other, impl="triton")
