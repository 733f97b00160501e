"""The pieces of `committee_attention`: loading a tile of keys and values, one step of the softmax, merging, finishing.

Each product that is added to something is an explicit fma, and every mask is applied after the arithmetic: the compiler then has no
choice that could round a row differently in the masked and the unmasked path, or in the merge in place and the one afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_part(
    part,
    q,  # [M, D]
    at,  # [M] the rows' positions
    at_least,
    at_most,
    head,
    inner,  # [M] see `weigh`
    scale,
    k_pages,
    v_pages,
    k_scale,
    v_scale,
    page_ptr,
    pages,
    length,
    key_begin,
    parts,
    window,
    page_stride,
    token_stride: tl.constexpr,
    head_stride: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    FP8: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of rows over one part's keys: weighted values `[M, D]`, largest exponent and sum of weights `[M]`."""
    segment = tl.load(parts + part * 3)
    first_key = tl.load(key_begin + segment)
    lo = tl.load(parts + part * 3 + 1)
    hi = tl.minimum(tl.load(parts + part * 3 + 2), tl.load(length + segment))
    hi = tl.minimum(hi, at_most - first_key + 1)  # no row sees the keys after it
    # Up to `full` every row sees every key. lo is a multiple of BLOCK_N, and so are all tiles' beginnings.
    if WINDOW:
        skip = at_least.to(tl.int64) - window + 1 - first_key
        lo = tl.maximum(lo, (tl.minimum(tl.maximum(skip, 0), hi) // BLOCK_N * BLOCK_N).to(tl.int32))
        full = lo
    else:
        full = lo + tl.maximum(tl.minimum(hi, at_least - first_key + 1) - lo, 0) // BLOCK_N * BLOCK_N
    page_list = pages + tl.load(page_ptr + segment)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    unit = tl.full((BLOCK_M,), 1.0, tl.float32)
    # A tile's page is asked for while the tile before it is worked on: a third of the time went by waiting for these numbers.
    page = page_of(page_list, lo, hi, PAGE, BLOCK_N)
    for key in tl.range(lo, full, BLOCK_N, num_stages=STAGES):
        next_page = page_of(page_list, key + BLOCK_N, hi, PAGE, BLOCK_N)
        k = load_tile(
            k_pages, page_list, page, key, hi, head, page_stride, token_stride, head_stride, D, PAGE, BLOCK_N, BLOCK_D,
            False,
        )  # fmt: skip
        v = load_tile(
            v_pages, page_list, page, key, hi, head, page_stride, token_stride, head_stride, D, PAGE, BLOCK_N, BLOCK_D,
            False,
        )  # fmt: skip
        k_factor = load_scales(k_scale, page_list, page, key, hi, head, HKV, PAGE, BLOCK_N, FP8)
        v_factor = load_scales(v_scale, page_list, page, key, hi, head, HKV, PAGE, BLOCK_N, FP8)
        every = tl.full((1, 1), 1, tl.int1)
        weight, shrink, top, total, unit = weigh(
            q, k, k_factor, v_factor, top, total, unit, inner, scale, every, DOT, FP8, SOFTCAP, False
        )
        acc = tl.dot(weight.to(DOT), v.to(DOT), acc * shrink[:, None], input_precision="ieee")
        page = next_page
    last = tl.minimum(at, first_key + hi - 1)  # position of the last key that a row sees here
    for key in tl.range(full, hi, BLOCK_N, num_stages=2 if STAGES > 1 else 1):
        offset = key + tl.arange(0, BLOCK_N)
        seen = (first_key + offset)[None, :] <= last[:, None]  # [M, N]
        if WINDOW:
            seen &= (first_key + offset).to(tl.int64)[None, :] > (at.to(tl.int64) - window)[:, None]
        next_page = page_of(page_list, key + BLOCK_N, hi, PAGE, BLOCK_N)
        k = load_tile(
            k_pages, page_list, page, key, hi, head, page_stride, token_stride, head_stride, D, PAGE, BLOCK_N, BLOCK_D,
            True,
        )  # fmt: skip
        k_factor = load_scales(k_scale, page_list, page, key, hi, head, HKV, PAGE, BLOCK_N, FP8)
        v = load_tile(
            v_pages, page_list, page, key, hi, head, page_stride, token_stride, head_stride, D, PAGE, BLOCK_N, BLOCK_D,
            True,
        )  # fmt: skip
        v_factor = load_scales(v_scale, page_list, page, key, hi, head, HKV, PAGE, BLOCK_N, FP8)
        weight, shrink, top, total, unit = weigh(
            q, k, k_factor, v_factor, top, total, unit, inner, scale, seen, DOT, FP8, SOFTCAP, True
        )
        acc = tl.dot(weight.to(DOT), v.to(DOT), acc * shrink[:, None], input_precision="ieee")
        page = next_page
    if FP8 and DOT == tl.float16:
        acc *= unit[:, None]
    return acc, top, total


@triton.jit
def page_of(page_list, key, hi, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of the tile that begins at `key`; any number where the tile has several, or begins at `hi` or after it."""
    if PAGE % BLOCK_N == 0:
        return tl.load(page_list + key // PAGE, mask=key < hi, other=0)
    else:
        return 0


@triton.jit
def load_tile(
    store,  # k_pages or v_pages
    page_list,  # the segment's pages
    page,  # the tile's, where it lies in one
    key,  # the tile's first key, an offset in the segment
    hi,  # the key after the last
    head,
    page_stride,
    token_stride: tl.constexpr,
    head_stride: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,  # keys from `hi` on are not read
):
    """Keys or values `[N, D]`."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    there = key + n < hi
    if PAGE % BLOCK_N == 0:  # a tile lies in one page: its number is a scalar, offsets within it fit 32 bits
        start = page.to(tl.int64) * page_stride + key % PAGE * token_stride + head * head_stride
        token = n * token_stride
    else:
        each = tl.load(page_list + (key + n) // PAGE, mask=there, other=0).to(tl.int64)
        start = head * head_stride
        token = each * page_stride + ((key + n) % PAGE) * token_stride
    at = store + start + token[:, None] + d[None, :]
    if MASKED:
        return tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def load_scales(
    scales,
    page_list,
    page,
    key,
    hi,
    head,
    HKV: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP8: tl.constexpr,
):
    """The scales `[N]` of a tile of fp8 keys or values; 1 where the pages have none."""
    offset = key + tl.arange(0, BLOCK_N)
    if FP8:
        if PAGE % BLOCK_N == 0:
            each = page.to(tl.int64)
        else:
            each = tl.load(page_list + offset // PAGE, mask=offset < hi, other=0).to(tl.int64)
        return tl.load(scales + (each * PAGE + offset % PAGE) * HKV + head, mask=offset < hi, other=0.0)
    else:
        return tl.full((BLOCK_N,), 1.0, tl.float32)


@triton.jit
def tanh(x):
    """Without libdevice, so that every target and the interpreter have it. Near 0 a series: 1 - 2 / (e^2x + 1) would cancel there."""
    square = x * x
    series = x * (1 + square * (-0.33333334 + square * (0.13333334 + square * (-0.05396825 + square * 0.021869488))))
    return tl.where(tl.abs(x) < 0.3, series, 1 - 2 / (tl.exp2(x * 2.885390081777927) + 1))


@triton.jit
def weigh(
    q,  # [M, D]
    k,  # [N, D]
    k_factor,  # [N]
    v_factor,
    top,  # [M] largest exponent so far
    total,  # [M] sum of weights so far
    unit,  # [M] power of two by which fp8 pages' weights times scales are divided, to stay within fp16
    inner,  # [M] factor on the product, to the exponent; with SOFTCAP: into tanh
    scale,  # [M] likewise after tanh
    seen,  # [M, N], read where MASKED
    DOT: tl.constexpr,
    FP8: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The weights `[M, N]` of a tile of keys, to be added to what came before times `shrink` `[M]`; the new top, total and unit.

    The online softmax of Milakov and Gimelshein (arXiv 1805.02867), exponents to base 2.
    """
    score = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee")  # [M, N]
    if FP8:
        score *= k_factor[None, :]
    if SOFTCAP:
        score = tanh(score * inner[:, None])
    exponent = score * scale[:, None]
    if MASKED:
        exponent = tl.where(seen, exponent, -float("inf"))
    new_top = tl.maximum(top, tl.max(exponent, axis=1))
    base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen nothing: exp2(-inf - 0) = 0, not NaN
    weight = tl.exp2(
        tl.fma(score, tl.broadcast_to(scale[:, None], score.shape), tl.broadcast_to(-base[:, None], score.shape))
    )
    if MASKED:
        weight = tl.where(seen, weight, 0.0)
    shrink = tl.exp2(top - base)
    total = tl.fma(total, shrink, tl.sum(weight, axis=1))
    if FP8:
        weight *= v_factor[None, :]
        if DOT == tl.float16:
            # Scales may be far from 1. Divided by the largest one seen, as a power of two, the weights stay within fp16.
            largest = v_factor[None, :] + tl.zeros_like(weight)
            if MASKED:
                largest = tl.where(seen, largest, 0.0)
            new_unit = tl.max(largest, axis=1)
            new_unit = tl.where(new_unit > 0, tl.exp2(tl.ceil(tl.log2(new_unit))), 0.0)
            new_unit = tl.maximum(tl.where(top == -float("inf"), 0.0, unit), new_unit)
            new_unit = tl.where(new_unit > 0, new_unit, 1.0)
            shrink *= unit / new_unit
            weight *= (1 / new_unit)[:, None]
            unit = new_unit
    return weight, shrink, new_top, total, unit


@triton.jit
def fold(all_acc, all_top, all_sum, acc, top, total):
    """Merges a partial result into those before it; one that saw nothing changes nothing, to the bit."""
    new_top = tl.maximum(all_top, top)
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    left = tl.exp2(all_top - base)
    right = tl.exp2(top - base)
    all_sum = tl.fma(total, right, all_sum * left)
    # What a row has not seen may be NaN all the same, 0 times a value that is not finite.
    acc = tl.where((top == -float("inf"))[:, None], 0.0, acc)
    all_acc = tl.fma(acc, tl.broadcast_to(right[:, None], acc.shape), all_acc * left[:, None])
    return all_acc, new_top, all_sum


@triton.jit
def load_part(partial, partial_ml, merge_slots, at, end, h, d, HEADS: tl.constexpr, D: tl.constexpr):
    """One part's result `[H, D]` of the heads `h`, its largest exponent and sum `[H]`; behind the last part, one that saw nothing."""
    source = tl.load(merge_slots + at, mask=at < end, other=0).to(tl.int64) * HEADS + h
    there = (h < HEADS) & (at < end)
    top = tl.load(partial_ml + source * 2, mask=there, other=-float("inf"))
    total = tl.load(partial_ml + source * 2 + 1, mask=there, other=0.0)
    # What a row that sees nothing left in its slot is anything, and does not count.
    acc = tl.load(partial + source[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
    return acc, top, total


@triton.jit
def finish(acc, top, total):
    """The result, zeros for a row that sees nothing, and its log-sum-exp, -inf for such a row. Infinite values seen make NaN."""
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    result = tl.where(tl.abs(result) < float("inf"), result, float("nan"))
    return result, (top + tl.log2(total)) * 0.6931471805599453


@triton.jit
def store_part(
    partial,
    partial_ml,
    acc,  # [M, D]
    top,  # [M]
    total,
    row_begin,
    row_end,
    slot,
    head,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Leaves a tile's partial result in its slots. A row that sees none of the part's keys has none: nobody reads it."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row = row_begin + m // GROUP
    here = row < row_end
    mine = (slot + row - row_begin).to(tl.int64) * (HKV * GROUP) + head * GROUP + m % GROUP
    tl.store(partial_ml + mine * 2, top, mask=here)
    tl.store(partial_ml + mine * 2 + 1, total, mask=here)
    stored = (here & (top != -float("inf")))[:, None] & (d < D)[None, :]
    tl.store(partial + mine[:, None] * D + d[None, :], acc, mask=stored)


@triton.jit
def store_rows(
    out,
    lse,
    acc,  # [M, D]
    top,  # [M]
    total,
    row_begin,
    row_end,
    head,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Finishes a tile that has seen all of its rows' keys."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row = row_begin + m // GROUP
    here = row < row_end
    index = row.to(tl.int64) * (HKV * GROUP) + head * GROUP + m % GROUP
    result, log_sum = finish(acc, top, total)
    inside = here[:, None] & (d < D)[None, :]
    tl.store(out + index[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + index, log_sum, mask=here)
