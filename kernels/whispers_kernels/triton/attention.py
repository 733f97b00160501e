"""`committee_attention`: one launch over work items, and a small second one that merges partial results.

A work item is a KV head, a tile of rows and a range of keys. All rows of the tile times the query heads of the group are one matrix of
BLOCK_M rows, so that a shared key is read once for all experts and meets the matrix units. Ranges and the order of merging come from
`schedule` and depend on key positions alone; all arithmetic on one row is the same in every tile and in both ways of merging, so a
row's bits do not depend on its neighbours. The same launch serves prefill, branch start and decode: only the items differ.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_parts import attend_part, finish, fold, load_part, store_part, store_rows
from .common import INTERPRETED, POINTER, Variant, on, refuse_float64

_LOG2E = math.log2(math.e)
_FP8 = torch.float8_e4m3fn
_MERGED_AT_ONCE = 16  # parts of a row on their way together
_TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def attend(
    q,  # [R, HKV * GROUP, D]
    k_pages,  # [N, PAGE, HKV, D]
    v_pages,
    k_scale,  # [N, PAGE, HKV] float32, or unused
    v_scale,
    out,  # [R, HKV * GROUP, D]
    lse,  # [R, HKV * GROUP] float32
    partial,  # [slots, HKV * GROUP, D] float32
    partial_ml,  # [slots, HKV * GROUP, 2] float32: largest exponent, sum
    position,
    page_ptr,
    pages,
    length,
    key_begin,
    header,
    items,
    parts,
    score_scale,  # to the softmax's exponent, base 2 (with SOFTCAP: into tanh)
    softcap,  # times log2 e
    window,
    q_row,  # strides
    q_head,
    page_stride,
    token_stride: tl.constexpr,  # one pool has one layout; a constant distance between a tile's rows lies in the load instruction
    head_stride: tl.constexpr,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the matrix products' arguments
    FP8: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IN_PLACE: tl.constexpr,  # items may have several parts
    STAGES: tl.constexpr,
):
    # The grid is what the table has room for, so that a captured graph can run it with any number of items in it. The hardware starts
    # the programs in order, the largest items first. The heads of an item are neighbours: together they read whole pages.
    work = tl.program_id(0)
    item = items + (work // HKV) * 6
    head = work % HKV
    row_begin, row_end = tl.load(item), tl.load(item + 1)
    part_begin, part_end, slot = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    if work >= tl.load(header) * HKV:  # asked for together with the item, which may hold anything then
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row = row_begin + m // GROUP  # [M]
    q_index = head * GROUP + m % GROUP
    here = row < row_end
    at = tl.load(position + row, mask=here, other=0)
    at_most = tl.max(tl.where(here, at, -2147483648))
    at_least = tl.min(tl.where(here, at, 2147483647))
    tile_q = tl.load(
        q + row.to(tl.int64)[:, None] * q_row + q_index[:, None] * q_head + d[None, :],
        mask=here[:, None] & (d < D)[None, :],
        other=0.0,
    )  # [M, D]
    scale = tl.full((BLOCK_M,), 1.0, tl.float32) * (softcap if SOFTCAP else score_scale)
    if FP8 and DOT == tl.float16 and tile_q.dtype == tl.bfloat16:
        # fp8 turns into fp16 for free, into bf16 at 256 conversions a tile. A power of two a row brings q into fp16's range.
        largest = tl.max(tl.abs(tile_q.to(tl.float32)), axis=1)
        unit_q = tl.where(largest > 0, tl.exp2(tl.floor(tl.log2(largest))), 1.0)
        tile_q = (tile_q.to(tl.float32) / unit_q[:, None]).to(DOT)
        inner = unit_q * score_scale
        if not SOFTCAP:
            scale = inner
    else:
        tile_q = tile_q.to(DOT)
        inner = tl.full((BLOCK_M,), 1.0, tl.float32) * score_scale

    if IN_PLACE:
        # A second accumulator: each part is summed from nothing, as where it has an item of its own, and folded in afterwards.
        all_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        all_top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        all_sum = tl.zeros((BLOCK_M,), tl.float32)
        for part in range(part_begin, part_end):
            acc, top, total = attend_part(
                part, tile_q, at, at_least, at_most, head, inner, scale, k_pages, v_pages, k_scale, v_scale,
                page_ptr, pages, length, key_begin, parts, window, page_stride, token_stride, head_stride,
                HKV, D, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, DOT, FP8, WINDOW, SOFTCAP, STAGES,
            )  # fmt: skip
            all_acc, all_top, all_sum = fold(all_acc, all_top, all_sum, acc, top, total)
        # Asked for again: kept through the loop, they would cost the registers that make it spill.
        row_begin, row_end, slot = tl.load(item), tl.load(item + 1), tl.load(item + 4)
        if tl.load(item + 5) != 0:
            store_rows(out, lse, all_acc, all_top, all_sum, row_begin, row_end, head, HKV, GROUP, D, BLOCK_M, BLOCK_D)
        else:
            store_part(
                partial, partial_ml, all_acc, all_top, all_sum, row_begin, row_end, slot, head,
                HKV, GROUP, D, BLOCK_M, BLOCK_D,
            )  # fmt: skip
    else:
        acc, top, total = attend_part(
            part_begin, tile_q, at, at_least, at_most, head, inner, scale, k_pages, v_pages, k_scale, v_scale,
            page_ptr, pages, length, key_begin, parts, window, page_stride, token_stride, head_stride,
            HKV, D, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, DOT, FP8, WINDOW, SOFTCAP, STAGES,
        )  # fmt: skip
        store_part(
            partial, partial_ml, acc, top, total, row_begin, row_end, slot, head, HKV, GROUP, D, BLOCK_M, BLOCK_D
        )


@triton.jit
def merge(
    partial,
    partial_ml,
    out,
    lse,
    header,
    merge_rows,
    merge_ptr,
    merge_slots,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Merges the partial results of one row and BLOCK_H of its heads, in their order."""
    index = tl.program_id(0)
    if index >= tl.load(header + 1):
        return
    row = tl.load(merge_rows + index).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    all_top = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    all_sum = tl.zeros((BLOCK_H,), tl.float32)
    all_acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    at, end = tl.load(merge_ptr + index), tl.load(merge_ptr + index + 1)
    while at < end:
        # A batch is on its way together: one after the other, each would wait for memory. They are folded in their order.
        batch = ()
        for i in tl.static_range(BATCH):
            batch += (load_part(partial, partial_ml, merge_slots, at + i, end, h, d, HEADS, D),)  # type: ignore[assignment]
        for i in tl.static_range(BATCH):
            acc, top, total = batch[i]  # type: ignore[var-annotated]
            all_acc, all_top, all_sum = fold(all_acc, all_top, all_sum, acc, top, total)
        at += BATCH
    result, log_sum = finish(all_acc, all_top, all_sum)
    index = row * HEADS + h
    tl.store(
        out + index[:, None] * D + d[None, :],
        result.to(out.dtype.element_ty),
        mask=(h < HEADS)[:, None] & (d < D)[None, :],
    )
    tl.store(lse + index, log_sum, mask=h < HEADS)


class Tiles(NamedTuple):
    """Shape of the work of one CTA."""

    rows: int  # BLOCK_M: rows times query heads of a group
    keys: int  # BLOCK_N
    warps: int
    stages: int


def tiles(q: torch.dtype, pages: torch.dtype, dim: int, chip: str) -> Tiles:
    """Tiles for q and pages of these dtypes: one shape for every step, since it is part of the order in which a row is summed.

    16-bit: 64 rows, since that is one warpgroup's wgmma on Hopper. The unused rows of a decode step cost nothing beside the loads: 64 keys
    take 0.35 us of matrix units and 1 us of a multiprocessor's share of the memory. 128 rows halve the reads of what is read again, and
    were slower all the same on an H100 but in long prefills (by 3 %): two small CTAs work while one large one would wait.
    Three stages instead of two: a tile more on its way, a fifth less time. Larger tiles spill registers (`docs/kernels.md`).
    """
    if dot_dtype(q, pages) == torch.float32:
        if chip == "sm100":
            return Tiles(16, 32, 8, 2)
        return Tiles(16, 16, 4, 1) if chip == "hip" else Tiles(16, 16 if dim <= 64 else 32, 8, 1)
    if dim > 128:
        if chip == "hip":
            return Tiles(32, 16, 4, 1) if pages == _FP8 else Tiles(64, 32, 4, 1)
        return Tiles(32, 32, 8, 2) if pages == _FP8 else Tiles(64, 32, 8, 1) if chip == "sm100" else Tiles(64, 16, 8, 2)
    if chip == "hip":
        return Tiles(64, 64 if dim <= 64 else 32, 4, 1)
    if chip == "sm90":
        return Tiles(64, 32, 4, 2) if pages == _FP8 and dim > 64 else Tiles(64, 64, 4, 2 if pages == _FP8 else 3)
    return Tiles(64, 64, 4, 3) if chip == "sm80" and dim <= 64 else Tiles(64, 32, 4, 2)


def dot_dtype(q: torch.dtype, pages: torch.dtype) -> torch.dtype:
    """What the matrix units multiply: fp8 pages as fp16, mixed dtypes as float32."""
    if pages == _FP8:
        return torch.float32 if q == torch.float32 else torch.float16
    return q if q == pages else torch.float32


@lru_cache
def chip_of(device: torch.device) -> str:
    """The kind of chip that tiles are chosen for: "sm80", "sm90", "sm100" (and all that follow each), "hip". Interpreted: Hopper's."""
    if torch.version.hip is not None:
        return "hip"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return "sm80" if major < 9 else "sm90" if major == 9 else "sm100"


def tile_rows(q: torch.dtype, pages: torch.dtype, group: int, dim: int, device: torch.device) -> int:
    """Rows of a tile, for a plan's schedule.

    Raises:
        ValueError: a group or a head dimension beyond the largest tile.
    """
    rows = tiles(q, pages, dim, chip_of(device)).rows // group
    if rows == 0 or dim > 256:
        raise ValueError(
            f"impl='triton': {group} q_heads a kv_head of head_dim {dim} in {q}; accepted: at most 16 q_heads, head_dim at most 256"
        )
    return rows


def committee_attention(
    q: Tensor,  # [R, Hq, D]
    k_pages: Tensor,  # [N, page_size, Hkv, D]
    v_pages: Tensor,
    position: Tensor,
    page_ptr: Tensor,
    pages: Tensor,
    length: Tensor,
    key_begin: Tensor,
    row_begin: Tensor,
    row_end: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    work: list[Tensor],  # the tensors of a `Work`
    sizes: list[int],  # its numbers
) -> tuple[Tensor, Tensor]:
    refuse_float64(q, k_pages)
    rows, q_heads, dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = q_heads // kv_heads
    _, slots, in_place = sizes
    header, items, parts, merge_rows, merge_ptr, merge_slots = work
    q = q if q.stride(2) == 1 else q.contiguous()
    for name, store in (("k_pages", k_pages), ("v_pages", v_pages)):
        if store.stride(3) != 1 or store.stride() != k_pages.stride():
            raise ValueError(f"{name}: strides {store.stride()}; accepted: those of k_pages, the last one 1")
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if factor is not None and not factor.is_contiguous():
            raise ValueError(f"{name}: strides {factor.stride()}; accepted: a contiguous tensor")
    out = torch.empty((rows, q_heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, q_heads), dtype=torch.float32, device=q.device)
    if rows == 0 or q_heads == 0:
        return out, lse
    partial = torch.empty((slots, q_heads, dim), dtype=torch.float32, device=q.device)
    partial_ml = torch.empty((slots, q_heads, 2), dtype=torch.float32, device=q.device)

    dot = dot_dtype(q.dtype, k_pages.dtype)
    shape = tiles(q.dtype, k_pages.dtype, dim, chip_of(q.device))
    with on(q):
        if items.shape[0] > 0:
            attend[(items.shape[0] * kv_heads,)](
                q,
                k_pages,
                v_pages,
                q if k_scale is None else k_scale,
                q if v_scale is None else v_scale,
                out,
                lse,
                partial,
                partial_ml,
                position,
                page_ptr,
                pages,
                length,
                key_begin,
                header,
                items,
                parts,
                scale * _LOG2E if softcap is None else scale / softcap,
                0.0 if softcap is None else softcap * _LOG2E,
                0 if window is None else min(window, 2**40),
                q.stride(0),
                q.stride(1),
                k_pages.stride(0),
                k_pages.stride(1),
                k_pages.stride(2),
                num_warps=shape.warps,
                num_stages=shape.stages,
                **_constexprs(
                    dot, kv_heads, group, dim, page_size, shape, k_scale is not None, window, softcap, in_place
                ),
            )
        if merge_rows.shape[0] > 0:
            block_h = heads_merged(q_heads, dim)
            merge[(merge_rows.shape[0], triton.cdiv(q_heads, block_h))](
                partial,
                partial_ml,
                out,
                lse,
                header,
                merge_rows,
                merge_ptr,
                merge_slots,
                HEADS=q_heads,
                D=dim,
                BLOCK_H=block_h,
                BLOCK_D=block_d(dim),
                BATCH=_MERGED_AT_ONCE,
                num_warps=1,
            )
    return out, lse


def heads_merged(q_heads: int, dim: int) -> int:
    """Heads of a row that one program merges: as many as give each of its 32 threads 16 bytes of a part to load."""
    return min(int(triton.next_power_of_2(q_heads)), max(1, 128 // block_d(dim)))


def block_d(dim: int) -> int:
    """The matrix units take at least 16, and powers of two."""
    return max(16, int(triton.next_power_of_2(dim)))


def _constexprs(
    dot: torch.dtype,
    kv_heads: int,
    group: int,
    dim: int,
    page_size: int,
    shape: Tiles,
    fp8: bool,
    window: int | None,
    softcap: float | None,
    in_place: bool | int,
) -> dict[str, Any]:
    # The interpreter multiplies the bit patterns of bfloat16.
    dot = torch.float32 if INTERPRETED and dot == torch.bfloat16 else dot
    return {
        "HKV": kv_heads,
        "GROUP": group,
        "D": dim,
        "PAGE": page_size,
        "BLOCK_M": shape.rows,
        "BLOCK_N": shape.keys,
        "BLOCK_D": block_d(dim),
        "DOT": _TRITON_DTYPE[dot],
        "FP8": fp8,
        "WINDOW": window is not None,
        "SOFTCAP": softcap is not None,
        "IN_PLACE": bool(in_place),
        "STAGES": shape.stages,
    }


def variants() -> list[Variant]:
    """What an engine launches: pages of 64, a group of 4 query heads a KV head, decode steps and steps with prefill in them.

    fp16 stands in for itself at one head dim: but for the opcodes it is bf16.
    """
    half, single = torch.bfloat16, torch.float32
    found = []
    for chip in ("sm80", "sm90", "sm100", "hip"):
        for dim in (64, 80, 96, 128, 256):
            kinds = [(half, half), (half, _FP8), (single, single)]
            if dim == 128:
                kinds += [(torch.float16, torch.float16), (torch.float16, _FP8)]
            for q, pages in kinds:
                if chip == "sm80" and pages == _FP8:
                    continue  # Ampere has no e4m3
                shape = tiles(q, pages, dim, chip)
                found += [_variant(q, pages, dim, shape, in_place, chip) for in_place in (False, True)]
    return [*found, *(_merge_variant(dim) for dim in (64, 128, 256))]


def _variant(q: torch.dtype, pages: torch.dtype, dim: int, shape: Tiles, in_place: bool, chip: str) -> Variant:
    fp8 = pages == _FP8
    constexprs = _constexprs(dot_dtype(q, pages), 8, 4, dim, 64, shape, fp8, None, None, in_place)
    float_pointer, index = POINTER[torch.float32], POINTER[torch.int32]
    scales = float_pointer if fp8 else POINTER[q]
    pointers = {
        "q": POINTER[q],
        "k_pages": POINTER[pages],
        "v_pages": POINTER[pages],
        "k_scale": scales,
        "v_scale": scales,
        "out": POINTER[q],
        "lse": float_pointer,
        "partial": float_pointer,
        "partial_ml": float_pointer,
        **dict.fromkeys(("position", "page_ptr", "pages", "length", "key_begin", "header", "items", "parts"), index),
    }
    strides = dict.fromkeys(("q_row", "q_head", "page_stride"), "i32")
    constexprs |= {"token_stride": 8 * dim, "head_stride": dim}
    return Variant(
        f"attend {_name(q)}{' fp8' if fp8 else ''} D{dim} M{shape.rows}{' in place' if in_place else ''}",
        attend,
        {**pointers, "score_scale": "fp32", "softcap": "fp32", "window": "i32", **strides},
        constexprs,
        shape.warps,
        shape.stages,
        (*pointers, *strides),
        chip,
    )


def _merge_variant(dim: int) -> Variant:
    pointers = dict.fromkeys(("partial", "partial_ml", "out", "lse"), POINTER[torch.float32])
    pointers |= dict.fromkeys(("header", "merge_rows", "merge_ptr", "merge_slots"), POINTER[torch.int32])
    pointers["out"] = POINTER[torch.bfloat16]
    sizes = {"HEADS": 32, "D": dim, "BLOCK_H": heads_merged(32, dim), "BLOCK_D": block_d(dim), "BATCH": _MERGED_AT_ONCE}
    return Variant(f"merge D{dim}", merge, pointers, sizes, 1, 2, tuple(pointers))


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
