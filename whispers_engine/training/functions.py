"""The decoder's operations with gradients for their inputs alone: the base is frozen, so none is ever computed for a weight.

Each is an `autograd.Function` that keeps little (no logits of a vocabulary, no large attention weights) and computes that again, or at
once, for the way back. Sums, exponentials and normalisations are in float32 whatever the dtype of the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

_ROWS_AT_ONCE = 128  # whose logits over the whole vocabulary exist at one time
_KEPT_BYTES = 16 << 20  # of a layer's attention weights; larger ones are computed again on the way back


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x normalised over its last dimension, times weight."""
    return cast("tuple[Tensor, Tensor]", _RmsNorm.apply(x, None, weight, eps))[0]


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalises `x + residual`; returns that and the sum."""
    return cast("tuple[Tensor, Tensor]", _RmsNorm.apply(x, residual, weight, eps))


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        wide = total.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(total, scale, weight)
        ctx.added = residual is not None
        return (wide * scale).to(x.dtype) * weight, total if residual is not None else x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        total, scale, weight = ctx.saved_tensors
        normal = total.float() * scale
        wide = grad.float() * weight.float()
        back = scale * (wide - normal * (wide * normal).mean(-1, keepdim=True))
        if ctx.added:
            back += grad_total
        back = back.to(total.dtype)
        return back, back if ctx.added else None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `[R, H, D]` by the angles whose cosine and sine are float32 `[R, D/2]`, in the half-split layout."""
    return cast(Tensor, _Rotate.apply(x, cos, sin))


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[R, 2 I]`: `[R, I]`."""
    return cast(Tensor, _SiluMul.apply(gate_up))


class _SiluMul(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        back = torch.empty_like(gate_up)
        back_gate, back_up = back.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=back_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=back_gate)
        return back


class Far(NamedTuple):
    """A context's keys and values of one layer, frozen, and the query rows that see it."""

    k: Tensor  # [Hkv, L, D]
    v: Tensor
    begin: int  # of the query rows
    end: int


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, far: Sequence[Far]) -> Tensor:
    """Attention of branches over their own keys and over the contexts that they share.

    Args:
        q: `[Hkv, N T g, D]`, scaled: the queries of N branches of T rows and the g heads of a group.
        k, v: `[Hkv, N, S, D]`, the branches' own; they get gradients.
        hidden: `[N, T, 1, S]` in q's dtype: -inf where a row does not see a key, else 0; every row sees at least one.
        far: contexts, each seen whole by consecutive query rows.

    Returns:
        As q. Softmax is over all that a row sees, own and far.
    """
    return cast(Tensor, _Attend.apply(q, k, v, hidden, far))


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, far: Sequence[Far]) -> Tensor:
        weights = _weights(q, k, hidden, far)
        keys = k.shape[2]
        out = torch.matmul(_apart(weights[..., :keys], k), v).flatten(1, 2)
        for one in far:
            seen = weights[:, one.begin : one.end, keys : keys + one.v.shape[1]]
            out[:, one.begin : one.end].baddbmm_(seen, one.v)
        kept = weights if weights.nbytes <= _KEPT_BYTES else None
        ctx.save_for_backward(q, k, v, hidden, kept)
        ctx.far = far
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden, weights = ctx.saved_tensors
        keys = k.shape[2]
        if weights is None:
            weights = _weights(q, k, hidden, ctx.far)
        slope = torch.zeros_like(weights) if _ragged(ctx.far) else torch.empty_like(weights)
        slope[..., :keys] = torch.matmul(_apart(grad, k), v.mT).flatten(1, 2)
        for one in ctx.far:
            rows, columns = slice(one.begin, one.end), slice(keys, keys + one.v.shape[1])
            slope[:, rows, columns] = torch.bmm(grad[:, rows], one.v.mT)
        slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
        near = _apart(slope[..., :keys], k)
        grad_v = torch.matmul(_apart(weights[..., :keys], k).mT, _apart(grad, k))
        grad_k = torch.matmul(near.mT, _apart(q, k))
        grad_q = torch.matmul(near, k).flatten(1, 2)
        for one in ctx.far:
            rows, columns = slice(one.begin, one.end), slice(keys, keys + one.v.shape[1])
            grad_q[:, rows].baddbmm_(slope[:, rows, columns], one.k)
        return grad_q, grad_k, grad_v, None, None


def _apart(x: Tensor, k: Tensor) -> Tensor:
    """`[Hkv, N T g, *]` -> `[Hkv, N, T g, *]`"""
    return x.unflatten(1, (k.shape[1], -1))


def _ragged(far: Sequence[Far]) -> bool:
    return len({one.k.shape[1] for one in far}) > 1


def _weights(q: Tensor, k: Tensor, hidden: Tensor, far: Sequence[Far]) -> Tensor:
    """What every row makes of its own keys, and behind those of its context's: `[Hkv, N T g, S + longest context]`, in q's dtype."""
    heads, branches, keys, _ = k.shape
    longest = max((one.k.shape[1] for one in far), default=0)
    scores = q.new_empty(*q.shape[:2], keys + longest)
    if _ragged(far):
        scores[..., keys:] = -torch.inf
    near = torch.matmul(_apart(q, k), k.mT)
    near.view(heads, branches, hidden.shape[1], -1, keys).add_(hidden)
    scores[..., :keys] = near.flatten(1, 2)
    for one in far:
        scores[:, one.begin : one.end, keys : keys + one.k.shape[1]] = torch.bmm(q[:, one.begin : one.end], one.k.mT)
    return scores.softmax(-1)


def log_normalizer(hidden: Tensor, head: Tensor) -> Tensor:
    """`logsumexp` of the logits over the whole vocabulary: float32 `[R]` of hidden states `[R, hidden]`.

    The gradient is found in the same pass, a few rows at a time, so that no logits are kept.
    """
    return cast(Tensor, _LogNormalizer.apply(hidden, head))


class _LogNormalizer(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor) -> Tensor:
        total = torch.empty(len(hidden), device=hidden.device)
        pull = torch.empty_like(hidden)
        for rows in torch.arange(len(hidden), device=hidden.device).split(_ROWS_AT_ONCE):
            weights = F.linear(hidden[rows], head).float()
            top = weights.amax(-1, keepdim=True)
            scale = weights.sub_(top).exp_().sum(-1, keepdim=True)
            total[rows] = (top + scale.log())[:, 0]
            if ctx.needs_input_grad[0]:
                pull[rows] = (torch.mm(weights.to(head.dtype), head).float() / scale).to(pull.dtype)
        ctx.save_for_backward(pull)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (pull,) = ctx.saved_tensors
        return (grad[:, None] * pull.float()).to(pull.dtype), None
