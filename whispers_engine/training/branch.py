"""The differentiable forward: the rows of a batch's branches through the frozen base, over contexts whose keys and values are kept.

Only inputs get gradients. Three placements are one forward with other rows and other keys (docs/semantics.md):

    suffix    rows: soft prompt, header, answer            keys: the cached context, the branch's own rows
    detached  rows: header, answer; each soft prompt once  keys: the cached context, the soft prompt's, the branch's own rows
    prefix    rows: context, header, answer; as detached   keys: the soft prompt's, the branch's own rows
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import LayerWeights
from .base import Base
from .functions import Far, add_norm, attend, log_normalizer, rms_norm, rotate, silu_mul
from .layout import Layout


def forward(base: Base, layout: Layout, parameters: Tensor, contexts: Sequence[Tensor]) -> Tensor:
    """The final, normalised hidden states `[S, hidden]` of the rows that are scored.

    Args:
        parameters: float32; soft prompts `[E, m, hidden]`, or learned keys and values `[E, layers, 2, Hkv, m, D]` as an expert has them.
        contexts: of each of the layout's contexts, `[layers, 2, Hkv, L, D]`.
    """
    config, weights = base.config, base.weights
    seats = _Seats(layout, config.q_heads, config.kv_heads, config.head_dim, base.dtype)
    learned = None
    text = F.embedding(layout.ids, weights.embeddings)
    if layout.source is None:
        learned = _rotated_kv(base, parameters)
        x = text
    else:
        # Gathered as float32: a soft prompt that stands in several branches sums its gradients there.
        x = torch.cat((parameters.flatten(0, 1), text.float()))[layout.source].to(base.dtype)
    cos, sin = base.rotation(layout.position)
    residual: Tensor | None = None
    for index, layer in enumerate(weights.layers):
        if residual is None:
            residual, x = x, rms_norm(x, layer.attn_norm, config.norm_eps)
        else:
            x, residual = add_norm(x, residual, layer.attn_norm, config.norm_eps)
        q, k, v = project(base, layer, x, cos, sin)
        front = None if learned is None else (learned[index, 0], learned[index, 1])
        x = seats.attend(q, k, v, [kept[index] for kept in contexts], front)
        if index == config.num_layers - 1:
            x, residual = x[layout.scored], residual[layout.scored]
        x = F.linear(x, layer.out, layer.out_bias)
        x, residual = add_norm(x, residual, layer.mlp_norm, config.norm_eps)
        x = F.linear(silu_mul(F.linear(x, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
    assert residual is not None
    return add_norm(x, residual, weights.norm, config.norm_eps)[0]


@torch.no_grad()
def run_alone(base: Base, x: Tensor, begin: int) -> Tensor:
    """Keys and values, `[layers, 2, Hkv, L, D]`, of embeddings `[L, hidden]` whose first stands at position `begin`."""
    config, weights = base.config, base.weights
    length = x.shape[0]
    kept = torch.empty(
        config.num_layers, 2, config.kv_heads, length, config.head_dim, dtype=base.dtype, device=base.device
    )
    cos, sin = base.rotation(torch.arange(begin, begin + length, device=base.device))
    residual: Tensor | None = None
    for index, layer in enumerate(weights.layers):
        if residual is None:
            residual, x = x, rms_norm(x, layer.attn_norm, config.norm_eps)
        else:
            x, residual = add_norm(x, residual, layer.attn_norm, config.norm_eps)
        q, k, v = (part.transpose(0, 1) for part in project(base, layer, x, cos, sin))  # [H, L, D]
        kept[index, 0], kept[index, 1] = k, v
        if index == config.num_layers - 1:
            break
        seen = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        x = F.linear(seen.transpose(0, 1).flatten(1), layer.out, layer.out_bias)
        x, residual = add_norm(x, residual, layer.mlp_norm, config.norm_eps)
        x = F.linear(silu_mul(F.linear(x, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
    return kept


def project(base: Base, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (both rotated) and values of rows `[R, hidden]`: `[R, H, D]` each."""
    config = base.config
    heads = F.linear(x, layer.qkv, layer.qkv_bias).unflatten(1, (-1, config.head_dim))
    if layer.q_norm is None or layer.k_norm is None:
        turned = rotate(heads[:, : config.q_heads + config.kv_heads], cos, sin)
        q, k = turned.split((config.q_heads, config.kv_heads), dim=1)
    else:
        q, k, _ = heads.split((config.q_heads, config.kv_heads, config.kv_heads), dim=1)
        q = rotate(rms_norm(q, layer.q_norm, config.norm_eps), cos, sin)
        k = rotate(rms_norm(k, layer.k_norm, config.norm_eps), cos, sin)
    return q, k, heads[:, config.q_heads + config.kv_heads :]


def option_scores(base: Base, layout: Layout, hidden: Tensor) -> Tensor:
    """Of every option, over all branches, the log-probability: float32 `[options]`.

    Of options that compete it lacks the normaliser of their first token, which is the same for all of a branch.
    """
    head = base.weights.head
    found = (hidden[layout.entry_row].float() * head[layout.entry_token].float()).sum(-1)
    if len(layout.whole):
        normalizer = log_normalizer(hidden[layout.whole], head)
        found = found - torch.cat((normalizer, normalizer.new_zeros(1)))[layout.entry_whole]
    return found.new_zeros(sum(layout.options)).index_add(0, layout.entry_option, found)


def _rotated_kv(base: Base, parameters: Tensor) -> Tensor:
    """Learned keys and values `[E, layers, 2, Hkv, m, D]` as attention reads them: `[layers, 2, Hkv, E, m, D]`.

    They are for a context that starts at m, and ours start at 0: keys are rotated by -m.
    """
    m = parameters.shape[4]
    keys, values = parameters.unbind(2)
    cos, sin = base.rotation(torch.tensor([-m], device=base.device))  # the same for all of them
    flat = keys.flatten(0, 2)  # [E layers Hkv, m, D]
    turned = rotate(flat, cos.expand(len(flat), -1), sin.expand(len(flat), -1)).view_as(keys)
    return torch.stack((turned, values), dim=1).permute(2, 1, 3, 0, 4, 5).to(base.dtype)


def _hidden(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: `[N, T, 1, S]` of bool `[N, T, S]`."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[:, :, None]


class _Seats:
    """Brings rows into the shapes that attention wants, and back."""

    def __init__(self, layout: Layout, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        self._layout = layout
        self._kv_heads = kv_heads
        self._group = q_heads // kv_heads
        self._dim = head_dim
        m = layout.visible.shape[2] - layout.shape[1]
        self._fronts = layout.front // m if layout.front else 0
        if self._fronts:
            causal = torch.ones(1, m, m, dtype=torch.bool, device=layout.ids.device).tril()
            self._front_hidden = _hidden(causal, dtype).expand(self._fronts, m, 1, m)
        self._hidden = _hidden(layout.visible, dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, contexts: Sequence[Tensor], learned: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Attention of a layer's rows: `[R, Hq D]`.

        Args:
            q, k, v: `[R, H, D]`.
            contexts: of each `[2, Hkv, L, D]`.
            learned: keys and values in front, `[Hkv, E, m, D]`; None: those of the batch's own first rows, if any.
        """
        layout = self._layout
        branches, rows = layout.shape
        parts = []
        if self._fronts:
            q0, k0, v0 = (part[: layout.front] for part in (q, k, v))
            q, k, v = (part[layout.front :] for part in (q, k, v))
            learned = self._keys(k0, self._fronts), self._keys(v0, self._fronts)
            seen = attend(self._queries(q0, self._fronts), *learned, self._front_hidden, ())
            parts.append(self._flat(seen, self._fronts, layout.front // self._fronts))
        if layout.grid is not None:
            q, k, v = (part[layout.grid.flatten()] for part in (q, k, v))
        near_k, near_v = self._keys(k, branches), self._keys(v, branches)
        if learned is not None:
            near_k = torch.cat((learned[0][:, layout.expert], near_k), dim=2)
            near_v = torch.cat((learned[1][:, layout.expert], near_v), dim=2)
        tile = rows * self._group
        far = [
            Far(kept[0], kept[1], first * tile, last * tile)
            for kept, (_, first, last) in zip(contexts, layout.contexts, strict=True)
        ]
        seen = self._flat(attend(self._queries(q, branches), near_k, near_v, self._hidden, far), branches, rows)
        parts.append(seen if layout.flat is None else seen[layout.flat])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _queries(self, q: Tensor, branches: int) -> Tensor:
        """`[N T, Hq, D]` -> `[Hkv, N T g, D]`, scaled"""
        grouped = q.unflatten(1, (self._kv_heads, self._group)).transpose(0, 1)
        return (grouped * self._dim**-0.5).contiguous().flatten(1, 2)

    def _keys(self, k: Tensor, branches: int) -> Tensor:
        """`[N T, Hkv, D]` -> `[Hkv, N, T, D]`"""
        return k.transpose(0, 1).unflatten(1, (branches, -1)).contiguous()

    def _flat(self, out: Tensor, branches: int, rows: int) -> Tensor:
        """`[Hkv, N T g, D]` -> `[N T, Hq D]`"""
        return out.view(self._kv_heads, branches * rows, -1, self._dim).transpose(0, 1).flatten(1)
