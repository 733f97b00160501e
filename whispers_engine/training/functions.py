"""The decoder's operations with gradients for their inputs alone: the base is frozen, so none is ever computed for a weight.

Each is an `autograd.Function` that keeps little (no attention weights, no logits of a vocabulary) and computes that again, or at once, for
the way back. Sums, exponentials and normalisations are in float32 whatever the dtype of the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

_ROWS_AT_ONCE = 128  # whose logits over the whole vocabulary exist at one time


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
        gate, up = (part.float() for part in gate_up.chunk(2, dim=-1))
        sigmoid, wide = gate.sigmoid(), grad.float()
        silu = gate * sigmoid
        slope = sigmoid + silu * (1 - sigmoid)  # of silu
        return torch.cat((wide * up * slope, wide * silu), dim=-1).to(gate_up.dtype)


class Far(NamedTuple):
    """A context's keys and values of one layer, frozen, and the query rows that see it."""

    k: Tensor  # [Hkv, L, D]
    v: Tensor
    begin: int  # of the query rows
    end: int


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, far: Sequence[Far], scale: float) -> Tensor:
    """Attention of branches over their own keys and over the contexts that they share.

    Args:
        q: `[Hkv, N T g, D]`: the queries of N branches of T rows and the g heads of a group.
        k, v: `[Hkv, N, S, D]`, the branches' own; they get gradients.
        visible: bool `[N, T, S]`; every row sees at least one.
        far: contexts, each seen whole by consecutive query rows.

    Returns:
        As q. Softmax is over all that a row sees, own and far.
    """
    return cast(Tensor, _Attend.apply(q, k, v, visible, far, scale))


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, far: Sequence[Far], scale: float) -> Tensor:
        near = _scores(q, k, visible, scale)  # float32 [Hkv, N, T g, S]
        wide = [torch.bmm(q[:, one.begin : one.end], one.k.mT).float() * scale for one in far]  # each [Hkv, rows, L]
        top = near.amax(-1, keepdim=True).flatten(1, 2)  # [Hkv, N T g, 1]
        for one, scores in zip(far, wide, strict=True):
            part = top[:, one.begin : one.end]
            torch.maximum(part, scores.amax(-1, keepdim=True), out=part)
        near = near.sub_(top.view(*near.shape[:3], 1)).exp_()
        total = near.sum(-1, keepdim=True).flatten(1, 2)
        out = torch.matmul(near.to(v.dtype), v).flatten(1, 2).float()
        for one, scores in zip(far, wide, strict=True):
            scores = scores.sub_(top[:, one.begin : one.end]).exp_()
            total[:, one.begin : one.end] += scores.sum(-1, keepdim=True)
            out[:, one.begin : one.end] += torch.bmm(scores.to(v.dtype), one.v)
        out = (out / total).to(q.dtype)
        ctx.save_for_backward(q, k, v, visible, out, top + total.log())
        ctx.far, ctx.scale = far, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, visible, out, lse = ctx.saved_tensors
        heads, branches = k.shape[:2]
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)  # [Hkv, N T g, 1]

        def apart(x: Tensor) -> Tensor:
            return x.view(heads, branches, -1, x.shape[-1])  # [Hkv, N, T g, *]

        weights = _scores(q, k, visible, ctx.scale).sub_(apart(lse)).exp_()
        grad_v = torch.matmul(weights.to(v.dtype).mT, apart(grad))
        slope = torch.matmul(apart(grad), v.mT).float().sub_(apart(delta)).mul_(weights).mul_(ctx.scale).to(q.dtype)
        grad_k = torch.matmul(slope.mT, apart(q))
        grad_q = torch.matmul(slope, k).flatten(1, 2)
        for one in ctx.far:
            rows = slice(one.begin, one.end)
            weights = torch.bmm(q[:, rows], one.k.mT).float().mul_(ctx.scale).sub_(lse[:, rows]).exp_()
            slope = torch.bmm(grad[:, rows], one.v.mT).float().sub_(delta[:, rows]).mul_(weights).mul_(ctx.scale)
            grad_q[:, rows] += torch.bmm(slope.to(q.dtype), one.k)
        return grad_q, grad_k, grad_v, None, None, None


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Float32 `[Hkv, N, T g, S]`; what a row does not see is -inf."""
    heads, branches, keys, dim = k.shape
    rows = visible.shape[1]
    scores = torch.matmul(q.view(heads, branches, -1, dim), k.mT).float().mul_(scale)
    hidden = ~visible[:, :, None]  # [N, T, 1, S], over a group's heads
    scores.view(heads, branches, rows, -1, keys).masked_fill_(hidden, float("-inf"))
    return scores


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
            logits = F.linear(hidden[rows], head)
            total[rows] = logits.float().logsumexp(-1)
            if ctx.needs_input_grad[0]:
                pull[rows] = torch.mm((logits.float() - total[rows, None]).exp_().to(head.dtype), head)
        ctx.save_for_backward(pull)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (pull,) = ctx.saved_tensors
        return (grad[:, None] * pull.float()).to(pull.dtype), None
