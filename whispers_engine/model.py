"""The frozen base: a lean decoder over ragged rows. One forward computes any mix of prefill, branch start and decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from whispers_kernels import Plan, committee_attention, embed_rows, rms_norm, rope_and_store, silu_mul
from whispers_kernels.ops import check_impl

from .config import ModelConfig
from .kv_cache import PagePool
from .sampling import first_largest
from .weights import Weights

if TYPE_CHECKING:
    from whispers_kernels.cpp.forward import Forward


class Wanted(NamedTuple):
    """Rows of a step whose final hidden states somebody reads."""

    rows: Tensor  # int64 [W], ascending
    plan: Plan  # of those rows alone


@dataclass(frozen=True)
class Batch:
    """The rows of one step, on the model's device."""

    ids: Tensor  # int64 [R]; token ids; from the vocabulary's size on, rows of `soft`
    soft: Tensor | None  # [P, hidden] virtual token embeddings of this step's rows
    slots: Tensor  # int64 [R] where each row's key goes in the pool
    plan: Plan
    wanted: Wanted | None = None  # None: all rows


class Model:
    """A decoder of the Llama, Mistral, Qwen2 or Qwen3 family over a page pool.

    Args:
        config: its shape.
        weights: its weights; their dtype is the dtype of the computation. The C++ kernels pack them and keep only that.
        impl: the kernels' implementation.
        quantization: of the layers' matrices, with the C++ kernels; None, or "int8".
    """

    def __init__(self, config: ModelConfig, weights: Weights, impl: str = "auto", quantization: str | None = None):
        self.config = config
        self.impl = check_impl(impl, weights.embeddings.device)
        self.dtype = weights.embeddings.dtype
        self.device = weights.embeddings.device
        self._inverse = config.inverse_frequencies().to(self.device)
        self._weights: Weights | None = weights
        self._packed: Forward | None = None
        if self.impl == "cpp":
            self._packed = _pack(config, weights, quantization)
            self._weights = None

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take."""
        if self._packed is not None:
            return self._packed.nbytes
        assert self._weights is not None
        return self._weights.nbytes

    def new_pool(self, num_pages: int, page_size: int) -> PagePool:
        """A pool of pages for this model, laid out as its kernels want them."""
        shape = self.config.num_layers, self.config.kv_heads, self.config.head_dim
        panels = self._packed is not None and self._packed.in_panels(page_size)
        return PagePool(num_pages, page_size, *shape, self.dtype, self.device, panels)

    def embed(self, ids: Tensor) -> Tensor:
        """The token embeddings of int64 ids `[R]`: `[R, hidden]`."""
        if self._packed is not None:
            return self._packed.embed(ids)
        assert self._weights is not None
        return self._weights.embeddings[ids]

    def on_device(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Host values as a tensor on the model's device, without waiting for it."""
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position's rotary angles, float32 `[R, D/2]`; positions may be negative."""
        angle = positions.float()[:, None] * self._inverse
        return angle.cos(), angle.sin()

    def forward(self, batch: Batch, pool: PagePool, taps: dict[int, Tensor | None] | None = None) -> Tensor:
        """Writes the rows' keys and values into the pool and returns the final, normalised hidden states of the wanted ones.

        `[W, hidden]`: of rows that nobody wants the last layer computes keys and values alone.

        Args:
            taps: its keys are layers whose hidden states `[R, hidden]` are wanted too, numbered as transformers'
                `hidden_states`; its values are filled in.

        Raises:
            ValueError: the final hidden states of all rows, where only some are wanted.
        """
        taps = {} if taps is None else taps
        layers = self.config.num_layers
        if batch.wanted is not None and layers in taps:
            raise ValueError(f"taps: {layers}, the final states; accepted with wanted rows: 0 to {layers - 1}")
        if self._packed is None:
            cos, sin = self.rotation(batch.plan.position)  # once a step, for all layers
            return self._compose(batch, pool, cos, sin, taps)
        rows = batch.ids.shape[0]
        filled = {layer: torch.empty(rows, self.config.hidden_size, dtype=self.dtype) for layer in taps}
        taps.update(filled)
        return self._packed(
            batch.ids, batch.soft, self._inverse, batch.slots, pool.k, pool.v, batch.plan, filled, batch.wanted
        )

    def _compose(
        self, batch: Batch, pool: PagePool, cos: Tensor, sin: Tensor, taps: dict[int, Tensor | None]
    ) -> Tensor:
        """The forward, operation by operation."""
        assert self._weights is not None
        config, impl, weights = self.config, self.impl, self._weights
        widths = [
            config.q_heads * config.head_dim,
            config.kv_heads * config.head_dim,
            config.kv_heads * config.head_dim,
        ]
        plan = batch.plan
        x = embed_rows(batch.ids, weights.embeddings, batch.soft, impl=impl)  # [R, hidden]
        residual: Tensor | None = None
        for index, layer in enumerate(weights.layers):
            x, residual = self._norm(x, layer.attn_norm, residual)
            if index in taps:
                taps[index] = residual
            q, k, v = (
                part.unflatten(1, (-1, config.head_dim))  # [R, H, D]
                for part in F.linear(x, layer.qkv, layer.qkv_bias).split(widths, dim=1)
            )
            if layer.q_norm is not None and layer.k_norm is not None:
                q = cast(Tensor, rms_norm(q, layer.q_norm, config.norm_eps, impl=impl))
                k = cast(Tensor, rms_norm(k, layer.k_norm, config.norm_eps, impl=impl))
            q = rope_and_store(q, k, v, cos, sin, batch.slots, pool.k[index], pool.v[index], impl=impl)
            if batch.wanted is not None and index == config.num_layers - 1:
                rows, plan = batch.wanted
                if not len(rows):
                    return x.new_empty(0, config.hidden_size)
                q, residual = q[rows], residual[rows]
            attended = cast(Tensor, committee_attention(q, pool.k[index], pool.v[index], plan, impl=impl))
            x = F.linear(attended.flatten(1), layer.out, layer.out_bias)
            x, residual = self._norm(x, layer.mlp_norm, residual)
            x = F.linear(
                silu_mul(F.linear(x, layer.gate_up, layer.gate_up_bias), impl=impl), layer.down, layer.down_bias
            )
        x, _ = self._norm(x, weights.norm, residual)
        if config.num_layers in taps:
            taps[config.num_layers] = x
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[R, V]` of final hidden states `[R, hidden]`: float32 from the C++ kernels, else in the model's dtype."""
        if self._packed is not None:
            return self._packed.logits(hidden)
        assert self._weights is not None
        return F.linear(hidden, self._weights.head)

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest next token int64 `[R]` of final hidden states `[R, hidden]`, and its log-probability, float32 `[R]`.

        Of equally likely tokens the one with the lowest id.
        """
        if self._packed is not None:
            return self._packed.likeliest(hidden)
        logits = self.logits(hidden).float()
        tokens = first_largest(logits)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)

    def _norm(self, x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalises x plus the residual; returns that and the new residual."""
        if residual is None:
            return cast(Tensor, rms_norm(x, weight, self.config.norm_eps, impl=self.impl)), x
        return cast("tuple[Tensor, Tensor]", rms_norm(x, weight, self.config.norm_eps, residual, impl=self.impl))


def _pack(config: ModelConfig, weights: Weights, quantization: str | None) -> Forward:
    from whispers_kernels.cpp.forward import Forward, Sizes  # only where there are C++ kernels

    sizes = Sizes(config.q_heads, config.kv_heads, config.head_dim, config.norm_eps)
    return Forward(weights.layers, weights.embeddings, weights.norm, weights.head, sizes, quantization)
