"""`embed_rows`: one gather from two tables.

A program copies BLOCK columns of one row, 16 bytes a thread and load. Every byte of the result is read once and written once, which
is the floor: `2 * R * hidden * size of an element`, and 8 bytes an id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import POINTER, Variant, on, refuse_float64

_MAX_BLOCK = 2048
_WARPS = 4


@triton.jit
def gather(
    ids,  # [R] int64
    table,  # [V, hidden]
    soft,  # [P, hidden], or unused
    out,  # [R, hidden], contiguous
    vocabulary,
    hidden,
    id_stride,
    table_row,
    table_column,
    soft_row,
    soft_column,
    BLOCK: tl.constexpr,
    HAS_SOFT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = column < hidden
    index = tl.load(ids + row * id_stride).to(tl.int64)  # a table may pass 2^31 elements
    if HAS_SOFT and index >= vocabulary:
        virtual = tl.load(soft + (index - vocabulary) * soft_row + column * soft_column, mask=inside)
        values = virtual.to(out.dtype.element_ty)
    else:
        values = tl.load(table + index * table_row + column * table_column, mask=inside)
    tl.store(out + row * hidden + column, values, mask=inside)


def embed_rows(ids: Tensor, table: Tensor, soft: Tensor | None) -> Tensor:
    refuse_float64(table, soft)
    rows, hidden = ids.shape[0], table.shape[1]
    out = torch.empty((rows, hidden), dtype=table.dtype, device=table.device)
    if out.numel() == 0:
        return out
    virtual = table if soft is None else soft
    block = _block(hidden)
    with on(table):
        gather[(rows, triton.cdiv(hidden, block))](
            ids,
            table,
            virtual,
            out,
            table.shape[0],
            hidden,
            ids.stride(0),
            *table.stride(),
            *virtual.stride(),
            BLOCK=block,
            HAS_SOFT=soft is not None,
            num_warps=_WARPS,
        )
    return out


def _block(hidden: int) -> int:
    return min(int(triton.next_power_of_2(hidden)), _MAX_BLOCK)


def variants() -> list[Variant]:
    """What an engine launches: a model's table with soft prompts of the same dtype, or kept in float32."""

    def variant(dtype: torch.dtype, soft: torch.dtype | None) -> Variant:
        integers = ("hidden", "table_row", "soft_row")
        return Variant(
            name=f"{POINTER[dtype][1:]} soft {'none' if soft is None else POINTER[soft][1:]}",
            kernel=gather,
            signature={
                "ids": "*i64",
                "table": POINTER[dtype],
                "soft": POINTER[soft or dtype],
                "out": POINTER[dtype],
                "vocabulary": "i32",
                **dict.fromkeys(integers, "i32"),
            },
            constexprs={
                "id_stride": 1,
                "table_column": 1,
                "soft_column": 1,
                "BLOCK": _block(4096),
                "HAS_SOFT": soft is not None,
            },
            num_warps=_WARPS,
            divisible=("ids", "table", "soft", "out", *integers),
        )

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [variant(bf16, None), variant(bf16, bf16), variant(bf16, fp32), variant(fp16, fp16), variant(fp32, fp32)]
