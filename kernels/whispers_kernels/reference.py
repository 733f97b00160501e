"""The definition of every operation, in plain PyTorch. A kernel is right when it agrees with these in float64.

All compute in float32 (float64 for float64 input) and round once, to the result's dtype. Arguments are those of `ops`, already checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest finite float8_e4m3fn


def to_fp8(x: Tensor) -> Tensor:
    """The nearest float8_e4m3fn, which beyond the largest is the largest itself. The format has no infinity: NaN.

    torch's own conversion of what is beyond 448 has been NaN and is 448, infinities included: it is asked for neither.
    """
    return x.masked_fill(x.isinf(), math.nan).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _independent_rows(row_begin: list[int], row_end: list[int]) -> list[tuple[int, int, list[int]]]:
    """Splits the rows so that no segment is seen from two parts: `(begin, end, its segments)`. Rows that see nothing are in none."""
    parts: list[tuple[int, int, list[int]]] = []
    for segment in sorted(range(len(row_begin)), key=row_begin.__getitem__):
        begin, end = row_begin[segment], row_end[segment]
        if begin == end:
            continue
        if parts and begin < parts[-1][1]:
            first, last, members = parts[-1]
            parts[-1] = (first, max(last, end), [*members, segment])
        else:
            parts.append((begin, end, [segment]))
    return parts


def committee_attention(
    q: Tensor,  # [R, Hq, D]
    k_pages: Tensor,  # [N, page_size, Hkv, D]
    v_pages: Tensor,
    position: Tensor,  # [R]; this and the next six: the plan
    page_ptr: Tensor,
    pages: Tensor,
    length: Tensor,
    key_begin: Tensor,
    row_begin: Tensor,
    row_end: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    k_scale: Tensor | None,  # [N, page_size, Hkv]
    v_scale: Tensor | None,
    work: list[Tensor] | None = None,  # for implementations that cut a plan into pieces; not read
    sizes: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """One softmax over the union of the keys that a row sees. Returns `[R, Hq, D]` and the log-sum-exp, float32 `[R, Hq]`."""
    rows, q_heads = q.shape[:2]
    page_size, kv_heads = k_pages.shape[1:3]
    wide = _wide(q.dtype)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((rows, q_heads), -math.inf, dtype=torch.float32, device=q.device)

    for begin, end, members in _independent_rows(row_begin.tolist(), row_end.tolist()):
        # One column for every key of every segment in this part: K = the sum of their lengths.
        segment = torch.tensor(members, device=q.device).repeat_interleave(length[members])  # [K]
        first = (length[members].cumsum(0) - length[members]).repeat_interleave(length[members])
        offset = torch.arange(segment.shape[0], device=q.device) - first  # [K] index of the key in its segment
        slot = pages[page_ptr[segment] + offset // page_size].long() * page_size + offset % page_size  # [K]
        key_position = key_begin[segment] + offset

        def load(store: Tensor, scales: Tensor | None, slot: Tensor = slot) -> Tensor:
            values = store.flatten(0, 1)[slot].to(wide)  # [K, Hkv, D]
            return values if scales is None else values * scales.flatten(0, 1)[slot].to(wide)[..., None]

        row = torch.arange(begin, end, device=q.device)[:, None]  # [r, 1]
        visible = (row >= row_begin[segment]) & (row < row_end[segment]) & (key_position <= position[begin:end, None])
        if window is not None:
            visible &= key_position > position[begin:end, None].long() - window  # [r, K]

        # All rows and grouped heads of a KV head are one matrix: [Hkv, group * r, D] x [Hkv, D, K].
        group = q_heads // kv_heads
        grouped = q[begin:end].to(wide).unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
        scores = torch.matmul(grouped * scale, load(k_pages, k_scale).permute(1, 2, 0)).unflatten(1, (group, -1))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -math.inf)  # [Hkv, group, r, K]
        total = torch.logsumexp(scores, dim=-1, keepdim=True)
        # A row that sees nothing has total = -inf; exp(-inf - 0) = 0 makes its result zeros, not NaN.
        weights = torch.exp(scores - total.masked_fill(total == -math.inf, 0.0))
        values = load(v_pages, v_scale).permute(1, 0, 2)  # [Hkv, K, D]
        result = torch.matmul(weights.flatten(1, 2), values.nan_to_num(0.0, 0.0, 0.0))  # [Hkv, group * r, D]
        if not bool(values.isfinite().all()):
            # 0 * NaN is NaN: a value that is not finite concerns the rows that see it, and no others.
            seen = visible.to(wide).repeat(group, 1).expand(kv_heads, -1, -1)
            result = result.masked_fill(torch.matmul(seen, (~values.isfinite()).to(wide)) > 0, math.nan)
        out[begin:end] = result.unflatten(1, (group, -1)).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
        lse[begin:end] = total.squeeze(-1).permute(2, 0, 1).flatten(1, 2).float()
    return out, lse


def embed_rows(ids: Tensor, table: Tensor, soft: Tensor | None) -> Tensor:
    """Row `ids[i]` of `table` followed by `soft`. Returns `[R, hidden]`."""
    if soft is None:
        return table[ids]
    out = table[ids.clamp(max=table.shape[0] - 1)]
    virtual = ids >= table.shape[0]
    out[virtual] = soft[ids[virtual] - table.shape[0]].to(table.dtype)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""
    wide = x.to(_wide(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and the sum itself, which is rounded to x's dtype before it is normalised."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout (Su et al., arXiv 2104.09864). x `[R, H, D]`, cos and sin `[R, D/2]`."""
    wide = _wide(x.dtype)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


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
    """Rotates q and k, writes k and v to their slots, returns the rotated q."""
    kept = slots >= 0
    slots = slots[kept]
    for values, store, scales in ((rotate(k, cos, sin), k_pages, k_scale), (v, v_pages, v_scale)):
        values = values[kept]
        if scales is not None:
            largest = values.abs().amax(-1).float()  # [r, Hkv]
            # An infinity makes it infinite. NaN, also beside an infinity, and what underflows leave it 1: they are not above 0.
            token_scale = torch.where(largest / FP8_MAX > 0, largest / FP8_MAX, torch.ones_like(largest))
            scales.view(-1, scales.shape[-1])[slots] = token_scale
            values = to_fp8(values.float() / token_scale[..., None])
        store.view(-1, *store.shape[2:])[slots] = values.to(store.dtype)
    return rotate(q, cos, sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[R, 2 * I]`, gate first."""
    gate, up = gate_up.to(_wide(gate_up.dtype)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype).contiguous()


def pool_logits(logits: Tensor, weights: Tensor, group_ptr: Tensor, rule: str) -> Tensor:
    """Pools each group's next-token distributions into one. Returns log-probabilities, float32 `[C, V]`."""
    bounds = group_ptr.tolist()
    wide = _wide(logits.dtype)
    out = torch.empty(len(bounds) - 1, logits.shape[1], dtype=torch.float32, device=logits.device)
    for group, (begin, end) in enumerate(pairwise(bounds)):
        asked = begin + torch.nonzero(weights[begin:end] > 0)[:, 0]  # weight 0 is skipped: 0 * -inf is NaN
        logp = torch.log_softmax(logits[asked].to(wide), dim=-1)  # [e, V]
        share = weights[asked].to(wide)[:, None]
        if rule == "mixture":
            out[group] = torch.logsumexp(share.log() + logp, dim=0)
        else:
            product = (share * logp).sum(0)
            # A token that one expert rules out is ruled out. Where that leaves none, every entry stays -inf.
            out[group] = product - torch.logsumexp(product, dim=0).nan_to_num(neginf=0.0)
    return out


IMPLS: dict[str, Callable[..., Any]] = {
    "committee_attention": committee_attention,
    "embed_rows": embed_rows,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rope_and_store": rope_and_store,
    "silu_mul": silu_mul,
    "pool_logits": pool_logits,
}
