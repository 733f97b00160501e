"""`committee_attention`: hands the plan's schedule to `csrc/attention.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import address, check_pages, dense, dtype_of, operation, page_dtype_of, page_layout

_committee_attention = operation("committee_attention", "36q2d")

# A tile's rows times grouped heads. The keys and values that it reads are turned for the matrix product once a tile: for 192 rows that is
# 2 % of the work, for 24 rows 12 %.
_TALL = 192


def tile_rows(q: torch.dtype, pages: torch.dtype, group: int, dim: int, device: torch.device) -> int:
    """Rows of a tile, for a plan's schedule."""
    return max(1, _TALL // group)


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
    kind, page_kind = dtype_of(q), page_dtype_of(k_pages)
    check_pages(k_pages, v_pages, k_scale, v_scale)
    q = dense(q)
    rows, q_heads, dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    out = torch.empty((rows, q_heads, dim), dtype=q.dtype)
    lse = torch.empty((rows, q_heads), dtype=torch.float32)
    tensors = q, k_pages, v_pages, k_scale, v_scale, out, lse, position, page_ptr, pages, length, key_begin, *work
    rows_of_tile, slots, _ = sizes
    _committee_attention(
        *map(address, tensors),
        *(q_heads, kv_heads, dim, page_size, rows_of_tile, slots),
        *q.stride()[:2],
        *page_layout(k_pages),
        *page_layout(v_pages),
        *(kind, page_kind, 0, 0 if window is None else min(window, 2**40)),
        scale,
        softcap or 0.0,
    )
    return out, lse
