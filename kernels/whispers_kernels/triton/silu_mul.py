"""`silu_mul`: BLOCK columns of one row a program, each byte read once and written once, which is the floor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import POINTER, Variant, on, refuse_float64

_MAX_BLOCK = 1024  # 8 numbers a thread: in 16-bit dtypes one load of 16 bytes of each half


@triton.jit
def exp_accurately(x):
    """e^x within some roundings for any x. The hardware's 2^(x log2 e) is off by |x| roundings: too much for float32 results."""
    # Clamped where 1 + e^x no longer changes or is infinite already, since infinities would make NaN below.
    x = tl.minimum(tl.maximum(x, -88.0), 100.0)
    # x log2 e to the nearest integer, as adding 1.5 * 2^23 leaves no fraction.
    whole = (x * 1.4426950408889634 + 12582912.0) - 12582912.0
    # Less that times ln 2, in two parts: the first is so short that its product is exact.
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(whole)


@triton.jit
def gated(
    gate_up,  # [R, 2 * width]
    out,  # [R, width], contiguous
    width,
    row_stride,
    column_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = gate_up + row * row_stride
    gate = tl.load(at + column.to(tl.int64) * column_stride, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + (width + column).to(tl.int64) * column_stride, mask=inside, other=0.0).to(tl.float32)
    if out.dtype.element_ty == tl.float32:
        activated = tl.div_rn(gate, 1.0 + exp_accurately(-gate))
    else:
        activated = gate / (1.0 + tl.exp(-gate))
    tl.store(out + row * width + column, (activated * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    refuse_float64(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    block, warps = _tile(width)
    with on(gate_up):
        gated[(rows, triton.cdiv(width, block))](gate_up, out, width, *gate_up.stride(), BLOCK=block, num_warps=warps)
    return out


def _tile(width: int) -> tuple[int, int]:
    block = min(int(triton.next_power_of_2(width)), _MAX_BLOCK)
    return block, max(1, block // 256)


def variants() -> list[Variant]:
    """What an engine launches."""
    block, warps = _tile(8192)
    return [
        Variant(
            name=POINTER[dtype][1:],
            kernel=gated,
            signature={"gate_up": POINTER[dtype], "out": POINTER[dtype], "width": "i32", "row_stride": "i32"},
            constexprs={"column_stride": 1, "BLOCK": block},
            num_warps=warps,
            divisible=("gate_up", "out", "width", "row_stride"),
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
