"""`pool_logits`: the vocabulary in fixed chunks, a few small launches, nothing read back to the host.

1. `sum_chunks`: the largest logit and the sum of exponentials of every chunk of every row that is asked.
2. `total_rows`: the same of whole rows, from their chunks in order.
3. `pool`: for every group and chunk, its members one after the other. How many there are, the device alone knows.
4. For `product`, whose pool needs a normaliser of its own: `pool` leaves the sums of its chunks too, `total_rows` adds them up, and
   `subtract` ends it in place.

Bytes: the logits twice (a normaliser needs all of a row before the first result) and the result once; for `product` three times, the
second and third while it is in the cache. The floor is both once; 64 rows of 128k logits in 16 bits are 16 MB, so that on a GPU with
that much L2 the second reading costs no bandwidth either. Chunks are fixed, so a group's bits do not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import POINTER, Variant, on, refuse_float64

_ROW_CHUNK, _ROW_WARPS = 4096, 8
_POOL_CHUNK, _POOL_WARPS = 1024, 4


@triton.jit
def sum_exponentials(x, top):
    """Of all of x, less its largest; 0 where nothing is above -inf, NaN where a number is NaN or infinite."""
    return tl.sum(tl.exp(x - tl.where(top == -float("inf"), 0.0, top)))


@triton.jit
def sum_chunks(
    logits,  # [R, V]
    weights,  # [R] float32
    chunks,  # [R, chunks, 2] float32: largest, sum of exponentials less it
    vocabulary,
    row_stride,
    column_stride,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(weights + row) > 0:
        column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        at = logits + row * row_stride + column.to(tl.int64) * column_stride
        x = tl.load(at, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        top = tl.max(x)
        place = chunks + (row * tl.num_programs(1) + tl.program_id(1)) * 2
        tl.store(place, top)
        tl.store(place + 1, sum_exponentials(x, top))


@triton.jit
def total_rows(
    chunks,  # [R, count, 2] float32
    weights,  # [R] float32, unused for POOLED rows
    totals,  # [R, 2] float32: a and b, such that x - a - b is what the next kernel wants
    count,
    MIXTURE: tl.constexpr,
    POOLED: tl.constexpr,  # the rows are pools, not logits
    COUNT: tl.constexpr,  # count, up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if not POOLED:
        weight = tl.load(weights + row)
    if weight > 0:
        index = tl.arange(0, COUNT)
        at = chunks + (row * count + index) * 2
        top = tl.load(at, mask=index < count, other=-float("inf"))
        part = tl.load(at + 1, mask=index < count, other=0.0)
        largest = tl.max(top)
        base = tl.where(largest == -float("inf"), 0.0, largest)
        # Largest and logarithm stay apart: x - largest is exact where a common offset makes both large.
        rest = tl.log(tl.sum(part * tl.exp(top - base)))
        if MIXTURE:
            rest -= tl.log(weight)
        if POOLED:
            # A pool that rules every token out stays -inf. Logits that do are no distribution: -inf - 0 + inf makes NaN of them.
            rest = tl.where(rest == -float("inf"), 0.0, rest)
        tl.store(totals + row * 2, base)
        tl.store(totals + row * 2 + 1, rest)


@triton.jit
def load_member(logits, member, end, row_stride, column_stride, column, vocabulary):
    """One chunk of its logits, zeros past the group's end."""
    limit = tl.where(member < end, vocabulary, 0)
    at = logits + member * row_stride + column.to(tl.int64) * column_stride
    return tl.load(at, mask=column < limit, other=0.0).to(tl.float32)


@triton.jit
def add_member(top, total, x, weights, totals, member, end, MIXTURE: tl.constexpr):
    """One member more: a running log-sum-exp in (top, total), or a running sum in total. Weight 0 changes nothing, whatever x holds."""
    there = member < end
    weight = tl.load(weights + member, mask=there, other=0.0)
    asked = weight > 0
    base = tl.load(totals + member * 2, mask=there, other=0.0)
    rest = tl.load(totals + member * 2 + 1, mask=there, other=0.0)
    x = (x - base) - rest
    if MIXTURE:
        x = tl.where(asked, x, -float("inf"))
        shift = x - top
        ratio = tl.where(x == -float("inf"), 0.0, tl.exp(-tl.abs(shift)))
        total = tl.where(shift > 0, tl.fma(total, ratio, 1.0), total + ratio)
        top = tl.maximum(top, x)
    else:
        total += tl.where(asked, x * weight, 0.0)
    return top, total


@triton.jit
def pool(
    logits,  # [R, V]
    weights,  # [R] float32
    group_ptr,  # [C + 1] int32
    totals,  # [R, 2] float32
    out,  # [C, V] float32, contiguous
    chunks,  # [C, chunks, 2] float32, written for a product
    vocabulary,
    row_stride,
    column_stride,
    MIXTURE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(group_ptr + group).to(tl.int64), tl.load(group_ptr + group + 1).to(tl.int64)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = column < vocabulary
    top = tl.full((CHUNK,), -float("inf"), tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    member = begin
    while member < end:
        # Four members' logits are on their way together; they are added in order, so that a row of weight 0 leaves no trace.
        x0 = load_member(logits, member, end, row_stride, column_stride, column, vocabulary)
        x1 = load_member(logits, member + 1, end, row_stride, column_stride, column, vocabulary)
        x2 = load_member(logits, member + 2, end, row_stride, column_stride, column, vocabulary)
        x3 = load_member(logits, member + 3, end, row_stride, column_stride, column, vocabulary)
        top, total = add_member(top, total, x0, weights, totals, member, end, MIXTURE)
        top, total = add_member(top, total, x1, weights, totals, member + 1, end, MIXTURE)
        top, total = add_member(top, total, x2, weights, totals, member + 2, end, MIXTURE)
        top, total = add_member(top, total, x3, weights, totals, member + 3, end, MIXTURE)
        member += 4
    result = total
    if MIXTURE:
        result = top + tl.log(total)
    tl.store(out + group * vocabulary + column, result, mask=inside)
    if not MIXTURE:
        result = tl.where(inside, result, -float("inf"))
        largest = tl.max(result)
        place = chunks + (group * tl.num_programs(1) + tl.program_id(1)) * 2
        tl.store(place, largest)
        tl.store(place + 1, sum_exponentials(result, largest))


@triton.jit
def subtract(out, totals, vocabulary, CHUNK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    at = out + group * vocabulary + column
    x = tl.load(at, mask=column < vocabulary)
    x = (x - tl.load(totals + group * 2)) - tl.load(totals + group * 2 + 1)
    tl.store(at, x, mask=column < vocabulary)


def pool_logits(logits: Tensor, weights: Tensor, group_ptr: Tensor, rule: str) -> Tensor:
    refuse_float64(logits)
    rows, vocabulary = logits.shape
    groups, mixture = group_ptr.shape[0] - 1, rule == "mixture"
    out = torch.empty((groups, vocabulary), dtype=torch.float32, device=logits.device)
    if out.numel() == 0:
        return out
    weights, group_ptr = weights.contiguous(), group_ptr.contiguous()
    count, pool_count = triton.cdiv(vocabulary, _ROW_CHUNK), triton.cdiv(vocabulary, _POOL_CHUNK)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    def total(chunks: Tensor, pooled: bool) -> Tensor:
        totals = floats(chunks.shape[0], 2)
        if chunks.shape[0] > 0:
            number = chunks.shape[1]
            total_rows[(chunks.shape[0],)](
                chunks,
                weights,
                totals,
                number,
                MIXTURE=mixture,
                POOLED=pooled,
                COUNT=triton.next_power_of_2(number),
                num_warps=1,
            )
        return totals

    with on(logits):
        chunks = floats(rows, count, 2)
        if rows > 0:
            sum_chunks[(rows, count)](
                logits, weights, chunks, vocabulary, *logits.stride(), CHUNK=_ROW_CHUNK, num_warps=_ROW_WARPS
            )
        pool_chunks = floats(0 if mixture else groups, pool_count, 2)
        pool[(groups, pool_count)](
            logits,
            weights,
            group_ptr,
            total(chunks, pooled=False),
            out,
            pool_chunks,
            vocabulary,
            *logits.stride(),
            MIXTURE=mixture,
            CHUNK=_POOL_CHUNK,
            num_warps=_POOL_WARPS,
        )
        if not mixture:
            subtract[(groups, pool_count)](
                out, total(pool_chunks, pooled=True), vocabulary, CHUNK=_POOL_CHUNK, num_warps=_POOL_WARPS
            )
    return out


def variants() -> list[Variant]:
    """What an engine launches: logits in the model's dtype, a vocabulary of 128k."""
    vocabulary = 131072
    strides = {"vocabulary": "i32", "row_stride": "i32"}

    def reading(dtype: torch.dtype) -> Variant:
        return Variant(
            name=f"sum_chunks {POINTER[dtype][1:]}",
            kernel=sum_chunks,
            signature={"logits": POINTER[dtype], "weights": "*fp32", "chunks": "*fp32", **strides},
            constexprs={"column_stride": 1, "CHUNK": _ROW_CHUNK},
            num_warps=_ROW_WARPS,
            divisible=("logits", "weights", "chunks", *strides),
        )

    def pooling(dtype: torch.dtype, rule: str) -> Variant:
        pointers = {"logits": POINTER[dtype], "weights": "*fp32", "group_ptr": "*i32"}
        pointers |= dict.fromkeys(("totals", "out", "chunks"), "*fp32")
        return Variant(
            name=f"pool {rule} {POINTER[dtype][1:]}",
            kernel=pool,
            signature={**pointers, **strides},
            constexprs={"column_stride": 1, "MIXTURE": rule == "mixture", "CHUNK": _POOL_CHUNK},
            num_warps=_POOL_WARPS,
            divisible=(*pointers, *strides),
        )

    totalling = Variant(
        name="total_rows",
        kernel=total_rows,
        signature={**dict.fromkeys(("chunks", "weights", "totals"), "*fp32"), "count": "i32"},
        constexprs={"MIXTURE": True, "POOLED": False, "COUNT": triton.next_power_of_2(vocabulary // _ROW_CHUNK)},
        num_warps=1,
        divisible=("chunks", "weights", "totals"),
    )
    subtracting = Variant(
        name="subtract",
        kernel=subtract,
        signature={"out": "*fp32", "totals": "*fp32", "vocabulary": "i32"},
        constexprs={"CHUNK": _POOL_CHUNK},
        num_warps=_POOL_WARPS,
        divisible=("out", "totals", "vocabulary"),
    )
    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        reading(bf16),
        reading(fp32),
        totalling,
        pooling(bf16, "mixture"),
        pooling(bf16, "product"),
        subtracting,
    ]
