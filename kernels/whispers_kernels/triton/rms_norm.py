"""`rms_norm` and `add_rms_norm`: rows in registers, read once and written once.

A program holds ROWS whole rows: one of a model's width, or several of a head's, where one alone would leave most threads idle. ROWS
follows from the width alone, so that a row is reduced in the same order in any batch. Bytes moved are the floor: x and the result
once each, with a residual that and the sum too; the weight stays in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import POINTER, Variant, on, refuse_float64


@triton.jit(do_not_specialize=["rows"])  # the one number that changes from step to step
def normalise(
    x,  # [rows / HEADS, HEADS, D], the last dimension contiguous; so is every other tensor's
    residual,  # likewise; unused without RESIDUAL
    weight,  # [D]
    out,
    total,  # x + residual; unused without RESIDUAL
    rows,
    heads,
    eps,
    x_row,  # strides
    x_head,
    residual_row,
    residual_head,
    out_row,  # of out and total
    out_head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, head = (index // heads).to(tl.int64)[:, None], (index % heads).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)
    inside = (index < rows)[:, None] & (d < D)[None, :]
    values = tl.load(x + row * x_row + head * x_head + d[None, :], mask=inside, other=0.0).to(tl.float32)  # [ROWS, D]
    factor = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    at = row * out_row + head * out_head + d[None, :]
    if RESIDUAL:
        more = tl.load(residual + row * residual_row + head * residual_head + d[None, :], mask=inside, other=0.0)
        # Rounded before it is normalised: the next layer adds to the sum that was returned.
        rounded = (values + more.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    mean_square = tl.sum(values * values, axis=1) / D
    result = values * tl.rsqrt(mean_square + eps)[:, None] * factor[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, weight, eps, None)[0]


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    return _launch(x, weight, eps, residual)


def _launch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The normalised rows, and the sum where there is a residual."""
    refuse_float64(x, weight, residual)
    out = torch.empty_like(x)
    total = out if residual is None else torch.empty_like(x)
    if out.numel() == 0:
        return out, total
    if not all(_has_plain_rows(tensor) for tensor in (x, out, residual) if tensor is not None):
        # A layout that no engine has: through dense copies.
        dense = x.reshape(-1, x.shape[-1]).contiguous()
        more = None if residual is None else residual.reshape(dense.shape).contiguous()
        result, summed = _launch(dense, weight, eps, more)
        return out.copy_(result.view(x.shape)), total.copy_(summed.view(x.shape))

    dim = x.shape[-1]
    block_d, rows_a_program, warps = _tile(dim)
    rows = x.numel() // dim
    added = x if residual is None else residual
    with on(x):
        normalise[(triton.cdiv(rows, rows_a_program),)](
            x,
            added,
            weight.contiguous(),
            out,
            total,
            rows,
            x.shape[1] if x.dim() == 3 else 1,
            float(eps),
            *_strides(x),
            *_strides(added),
            *_strides(out),
            D=dim,
            BLOCK_D=block_d,
            ROWS=rows_a_program,
            RESIDUAL=residual is not None,
            num_warps=warps,
        )
    return out, total


def _has_plain_rows(tensor: Tensor) -> bool:
    return tensor.dim() <= 3 and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1)


def _strides(tensor: Tensor) -> tuple[int, int]:
    """Of rows and of heads; what has no heads is one head."""
    strides = tensor.stride()
    return (strides[0] if tensor.dim() > 1 else 0, strides[1] if tensor.dim() == 3 else 0)


def _tile(dim: int) -> tuple[int, int, int]:
    """BLOCK_D, ROWS and warps: about 16 numbers a thread, two loads of 16 bytes each in 16-bit dtypes."""
    block_d = int(triton.next_power_of_2(dim))
    rows = max(1, min(1024 // block_d, 32))
    return block_d, rows, max(1, min(block_d * rows // 512, 16))


def variants() -> list[Variant]:
    """What an engine launches: a model's width with a residual, a head's without."""

    def variant(dtype: torch.dtype, dim: int, residual: bool) -> Variant:
        block_d, rows, warps = _tile(dim)
        pointers = ("x", "residual", "weight", "out", "total")
        strides = ("x_row", "x_head", "residual_row", "residual_head", "out_row", "out_head")
        return Variant(
            name=f"{POINTER[dtype][1:]} D{dim}{' residual' if residual else ''}",
            kernel=normalise,
            signature={
                **dict.fromkeys(pointers, POINTER[dtype]),
                "rows": "i32",
                **({} if residual else {"heads": "i32"}),
                "eps": "fp32",
                **dict.fromkeys(strides, "i32"),
            },
            constexprs={
                **({"heads": 1} if residual else {}),
                "D": dim,
                "BLOCK_D": block_d,
                "ROWS": rows,
                "RESIDUAL": residual,
            },
            num_warps=warps,
            divisible=(*pointers, *strides),
        )

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        variant(bf16, 4096, True),
        variant(bf16, 8192, True),
        variant(fp16, 2048, True),
        variant(fp32, 4096, True),
        variant(bf16, 128, False),
        variant(fp32, 64, False),
    ]
