"""`rope_and_store`: a program turns BLOCK_H heads of one row, of q, k or v, and writes them where they belong.

Everything is read once and written once: the floor, but for the angles, which a row's programs share through the cache. Head sizes
need not be powers of two; the two halves of a head are loads of their own, so that each thread has both numbers of a pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import POINTER, Variant, on, refuse_float64

_FP8 = torch.float8_e4m3fn


@triton.jit
def load_halves(x, at, inside, D: tl.constexpr):
    """Both halves of some heads, float32 `[BLOCK_H, HALF]`."""
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(x + at + D // 2, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def turn(first, second, cos, sin):
    """The sums as explicit fma: were the compiler to choose which product to round, it might choose differently for q and for k."""
    sin = tl.broadcast_to(sin, first.shape)
    cos = tl.broadcast_to(cos, first.shape)
    return tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin)


@triton.jit
def to_e4m3(x):
    """The bits of float8_e4m3fn nearest to a float32 (ties to even; beyond the largest that), for every GPU: sm_80 has no such type.

    NaN for an infinity, which the format has not, and for NaN.
    """
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: rounded to 3 bits of mantissa, the exponent's bias changed from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20).to(tl.int32) - (120 << 3)
    # Below 2^-6 the step is 2^-9, that of a float32 between 2^14 and 2^15.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude < 0x7F800000, code, 0x7F)
    return (code | (bits >> 24).to(tl.int32) & 0x80).to(tl.uint8)


@triton.jit
def store_token(pages, scales, first, second, slot, head, d, inside, page_stride, token_stride, head_stride,
                HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr):  # fmt: skip
    """Writes heads of one token, `[BLOCK_H, HALF]` twice, to its slot."""
    at = (slot // PAGE) * page_stride + (slot % PAGE) * token_stride + head[:, None] * head_stride + d[None, :]
    if FP8:
        # As integers magnitudes compare as they do as numbers, and NaN is the largest.
        bits = tl.maximum(first.to(tl.int32, bitcast=True) & 0x7FFFFFFF, second.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        largest = tl.max(bits, axis=1).to(tl.float32, bitcast=True)  # [BLOCK_H]
        scale = tl.div_rn(largest, 448.0)
        scale = tl.where(scale > 0, scale, 1.0)
        tl.store(scales + slot * HKV + head, scale, mask=head < tl.where(slot >= 0, HKV, 0))
        divisor = tl.broadcast_to(scale[:, None], first.shape)
        tl.store(pages + at, to_e4m3(tl.div_rn(first, divisor)), mask=inside)
        tl.store(pages + at + D // 2, to_e4m3(tl.div_rn(second, divisor)), mask=inside)
    else:
        tl.store(pages + at, first.to(pages.dtype.element_ty), mask=inside)
        tl.store(pages + at + D // 2, second.to(pages.dtype.element_ty), mask=inside)


@triton.jit
def turn_and_store(
    q,  # [R, HQ, D]
    k,  # [R, HKV, D]
    v,
    cos,  # [R, D / 2]
    sin,
    slots,  # [R] int64
    out,  # [R, HQ, D], contiguous
    k_pages,  # [N, PAGE, HKV, D]; fp8 as bytes
    v_pages,
    k_scale,  # [N, PAGE, HKV], contiguous; unused without FP8
    v_scale,
    q_row,  # strides; the last dimension of all is contiguous
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    cos_row,
    sin_row,
    page_stride,  # of k_pages and v_pages
    token_stride,
    head_stride,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,  # D / 2, up to a power of two
    FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # blocks of q's heads, then of k's, then of v's
    Q_PARTS: tl.constexpr = (HQ + BLOCK_H - 1) // BLOCK_H
    KV_PARTS: tl.constexpr = (HKV + BLOCK_H - 1) // BLOCK_H
    d = tl.arange(0, HALF)
    turning = d < D // 2
    block = tl.arange(0, BLOCK_H)
    c = tl.load(cos + row * cos_row + d, mask=turning, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * sin_row + d, mask=turning, other=0.0).to(tl.float32)[None, :]
    if part < Q_PARTS:
        head = part * BLOCK_H + block
        inside = (head < HQ)[:, None] & turning[None, :]
        first, second = load_halves(q, row * q_row + head[:, None] * q_head + d[None, :], inside, D)
        first, second = turn(first, second, c, s)
        at = row * (HQ * D) + head[:, None] * D + d[None, :]
        tl.store(out + at, first.to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + D // 2, second.to(out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + row)
        head = (part - Q_PARTS) % KV_PARTS * BLOCK_H + block
        inside = (head < tl.where(slot >= 0, HKV, 0))[:, None] & turning[None, :]  # slot -1: not stored
        if part < Q_PARTS + KV_PARTS:
            first, second = load_halves(k, row * k_row + head[:, None] * k_head + d[None, :], inside, D)
            first, second = turn(first, second, c, s)
            # Rounded to its own dtype first: what is stored is what the operation would return.
            first = first.to(k.dtype.element_ty).to(tl.float32)
            second = second.to(k.dtype.element_ty).to(tl.float32)
            store_token(k_pages, k_scale, first, second, slot, head, d, inside, page_stride, token_stride, head_stride,
                        HKV, D, PAGE, FP8)  # fmt: skip
        else:
            first, second = load_halves(v, row * v_row + head[:, None] * v_head + d[None, :], inside, D)
            store_token(v_pages, v_scale, first, second, slot, head, d, inside, page_stride, token_stride, head_stride,
                        HKV, D, PAGE, FP8)  # fmt: skip


def rope_and_store(
    q: Tensor,  # [R, Hq, D]
    k: Tensor,  # [R, Hkv, D]
    v: Tensor,
    cos: Tensor,  # [R, D/2]
    sin: Tensor,
    slots: Tensor,  # [R]
    k_pages: Tensor,  # [N, page_size, Hkv, D], written
    v_pages: Tensor,
    k_scale: Tensor | None,  # [N, page_size, Hkv], written
    v_scale: Tensor | None,
) -> Tensor:
    refuse_float64(q, cos, sin, k_pages)
    rows, q_heads, dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    for name, store in (("k_pages", k_pages), ("v_pages", v_pages)):
        if store.stride(3) != 1 or store.stride() != k_pages.stride():
            raise ValueError(f"{name}: strides {store.stride()}; accepted: those of k_pages, the last one 1")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and not scale.is_contiguous():
            raise ValueError(f"{name}: strides {scale.stride()}; accepted: a contiguous tensor")
    out = torch.empty((rows, q_heads, dim), dtype=q.dtype, device=q.device)
    q, k, v, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    block_h, half, warps = _tile(kv_heads, dim)
    parts = triton.cdiv(q_heads, block_h) + 2 * triton.cdiv(kv_heads, block_h)
    if rows * parts * dim == 0:
        return out
    fp8 = k_pages.dtype == _FP8
    with on(q):
        turn_and_store[(rows, parts)](
            q,
            k,
            v,
            cos,
            sin,
            slots.contiguous(),
            out,
            k_pages.view(torch.uint8) if fp8 else k_pages,
            v_pages.view(torch.uint8) if fp8 else v_pages,
            cos if k_scale is None else k_scale,
            cos if v_scale is None else v_scale,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            *k_pages.stride()[:3],
            HQ=q_heads,
            HKV=kv_heads,
            D=dim,
            PAGE=page_size,
            BLOCK_H=block_h,
            HALF=half,
            FP8=fp8,
            num_warps=warps,
        )
    return out


def _tile(kv_heads: int, dim: int) -> tuple[int, int, int]:
    """BLOCK_H, HALF and warps: 256 to 1024 pairs, 8 a thread, so that a half is one load of 16 bytes in 16-bit dtypes."""
    half = int(triton.next_power_of_2(max(1, dim // 2)))
    block_h = max(1, 256 // half, min(int(triton.next_power_of_2(kv_heads)), 1024 // half))
    return block_h, half, max(1, min(block_h * half // 256, 4))


def variants() -> list[Variant]:
    """What an engine launches: pages of the model's dtype, or fp8."""

    def variant(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, fp8: bool = False) -> Variant:
        block_h, half, warps = _tile(kv_heads, dim)
        pages = "*u8" if fp8 else POINTER[dtype]
        of_angles = ("cos_row", "sin_row")
        of_heads = (
            "q_row",
            "q_head",
            "k_row",
            "k_head",
            "v_row",
            "v_head",
            "page_stride",
            "token_stride",
            "head_stride",
        )
        signature = {
            **dict.fromkeys(("q", "k", "v"), POINTER[dtype]),
            **dict.fromkeys(("cos", "sin"), "*fp32"),
            "slots": "*i64",
            "out": POINTER[dtype],
            **dict.fromkeys(("k_pages", "v_pages"), pages),
            **dict.fromkeys(("k_scale", "v_scale"), "*fp32"),
        }
        pointers = tuple(signature)
        return Variant(
            name=f"{POINTER[dtype][1:]} D{dim}{' fp8 pages' if fp8 else ''}",
            kernel=turn_and_store,
            signature={**signature, **dict.fromkeys((*of_angles, *of_heads), "i32")},
            constexprs={
                "HQ": heads,
                "HKV": kv_heads,
                "D": dim,
                "PAGE": 64,
                "BLOCK_H": block_h,
                "HALF": half,
                "FP8": fp8,
            },
            num_warps=warps,
            divisible=(*pointers, *of_heads, *(of_angles if dim % 32 == 0 else ())),
        )

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        variant(bf16, 32, 8, 128),
        variant(bf16, 32, 8, 128, fp8=True),
        variant(bf16, 9, 3, 64),
        variant(fp16, 32, 32, 80),
        variant(fp32, 32, 8, 64),
        variant(bf16, 16, 8, 256),
    ]
