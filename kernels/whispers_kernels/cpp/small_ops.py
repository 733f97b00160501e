"""The operations that treat every row alone, or every group of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import address, check_pages, dense, dtype_of, operation, page_dtype_of, page_layout

_embed_rows = operation("embed_rows", "12q")
_rms_norm = operation("rms_norm", "11qd")
_rope_and_store = operation("rope_and_store", "32q")
_silu_mul = operation("silu_mul", "6q")
_pool_logits = operation("pool_logits", "10q")


def embed_rows(ids: Tensor, table: Tensor, soft: Tensor | None) -> Tensor:
    kind, soft_kind = dtype_of(table), 0 if soft is None else dtype_of(soft)
    ids, table, soft = ids.contiguous(), dense(table), None if soft is None else dense(soft)
    rows, (vocabulary, hidden) = ids.shape[0], table.shape
    out = torch.empty((rows, hidden), dtype=table.dtype)
    soft_row = 0 if soft is None else soft.stride(0)
    pointers = address(ids), address(table), address(soft), address(out)
    _embed_rows(*pointers, rows, vocabulary, hidden, table.stride(0), soft_row, kind, soft_kind, kind)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, weight, eps, None)[0]


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    return _norm(x, weight, eps, residual)


def _norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm, and the sum with a residual (without one: nothing of use)."""
    kind, weight_kind = dtype_of(x), dtype_of(weight)
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    out = torch.empty_like(x)
    if not out.is_contiguous():  # strides as x has them are promised
        out, total = _norm(x.contiguous(), weight, eps, None if residual is None else residual.contiguous())
        return torch.empty_like(x).copy_(out), torch.empty_like(x).copy_(total)
    total = out if residual is None else torch.empty_like(x)
    flat = dense(x.reshape(rows, width))
    added = None if residual is None else dense(residual.reshape(rows, width))
    weight = weight.contiguous()
    pointers = address(flat), address(added), address(weight), address(out), address(total)
    strides = flat.stride(0), 0 if added is None else added.stride(0)
    _rms_norm(*pointers, rows, width, *strides, kind, weight_kind, eps)
    return out, total


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    kind, page_kind = dtype_of(q), page_dtype_of(k_pages)
    dtype_of(cos), dtype_of(sin)  # refused where they are float64
    check_pages(k_pages, v_pages, k_scale, v_scale)
    q, k, v = dense(q), dense(k), dense(v)
    cos, sin, slots = cos.float().contiguous(), sin.float().contiguous(), slots.contiguous()
    rows, q_heads, dim = q.shape
    out = torch.empty((rows, q_heads, dim), dtype=q.dtype)
    pointers = [address(t) for t in (q, k, v, cos, sin, slots, out, k_pages, v_pages, k_scale, v_scale)]
    sizes = rows, q_heads, k.shape[1], dim, k_pages.shape[1]
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], dim // 2
    _rope_and_store(*pointers, *sizes, *strides, *page_layout(k_pages), *page_layout(v_pages), kind, page_kind, 0)
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    kind = dtype_of(gate_up)
    gate_up = dense(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype)
    _silu_mul(address(gate_up), address(out), rows, width, gate_up.stride(0), kind)
    return out


def pool_logits(logits: Tensor, weights: Tensor, group_ptr: Tensor, rule: str) -> Tensor:
    kind = dtype_of(logits)
    logits, weights, group_ptr = dense(logits), weights.contiguous(), group_ptr.contiguous()
    (rows, vocabulary), groups = logits.shape, group_ptr.shape[0] - 1
    out = torch.empty((groups, vocabulary), dtype=torch.float32)
    pointers = address(logits), address(weights), address(group_ptr), address(out)
    _pool_logits(*pointers, rows, vocabulary, groups, logits.stride(0), kind, int(rule == "product"))
    return out
