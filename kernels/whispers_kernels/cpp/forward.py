"""A decoder's whole forward in one call (`csrc/forward.h`): the six operations and the linears between them, composed in C++."""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..memory import Memory
from ..plan import FixedPlan, Plan
from .attention import tile_rows
from .library import address, bf16_step, check_pages, dense, dtype_of, operation, page_layout
from .likeliest import likeliest_of
from .linear import PackedLinear

# A Forward of csrc/forward_args.h: itself, then its EmbedRows, UnpackRows, RopeAndStore, Attention and Wanted.
_forward = operation("forward", "18qd" + "12q" + "17q" + "32q" + "36q2d" + "10q")
_OUT = 5 * 8  # where in it the result's place is


class LayerWeights(Protocol):
    """One decoder layer, in one float dtype on the CPU."""

    @property
    def attn_norm(self) -> Tensor: ...  # [hidden]
    @property
    def qkv(self) -> Tensor: ...  # [(Hq + 2 Hkv) D, hidden]
    @property
    def qkv_bias(self) -> Tensor | None: ...
    @property
    def q_norm(self) -> Tensor | None: ...  # [D]
    @property
    def k_norm(self) -> Tensor | None: ...
    @property
    def out(self) -> Tensor: ...  # [hidden, Hq D]
    @property
    def out_bias(self) -> Tensor | None: ...
    @property
    def mlp_norm(self) -> Tensor: ...  # [hidden]
    @property
    def gate_up(self) -> Tensor: ...  # [2 I, hidden]
    @property
    def gate_up_bias(self) -> Tensor | None: ...
    @property
    def down(self) -> Tensor: ...  # [hidden, I]
    @property
    def down_bias(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Sizes:
    """The decoder's shape."""

    q_heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float


class _Step(NamedTuple):
    """What a forward is over, but for soft prompts, taps and wanted rows; as in `Forward.__call__`."""

    ids: Tensor
    inverse: Tensor
    slots: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    room: list[Tensor]  # as `_working` gives it


class Forward:
    """A decoder whose weights are packed, and its forward.

    Args:
        layers: the weights, packed one after the other and not kept.
        embeddings: `[V, hidden]`.
        norm: `[hidden]`, the last one.
        head: `[V, hidden]`; the very tensor `embeddings` where it is tied: it is then packed once, and rows are read from there.
        sizes: the decoder's shape.
        quantization: of the layers' matrices; the head keeps the weights' dtype. None, or "int8".

    Attributes:
        nbytes: of all weights that are held.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        embeddings: Tensor,
        norm: Tensor,
        head: Tensor,
        sizes: Sizes,
        quantization: str | None = None,
    ):
        self._sizes = sizes
        self._dtype = embeddings.dtype
        self._width = embeddings.shape[1]
        self._intermediate = layers[0].down.shape[1]
        memory = Memory()
        self._packed: list[PackedLinear] = []
        self._norms: list[Tensor] = []
        blocks: list[int] = []
        for layer in layers:
            norms = (layer.attn_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
            matrices = [
                PackedLinear(layer.qkv, layer.qkv_bias, quantization, memory=memory),
                PackedLinear(layer.out, layer.out_bias, quantization, memory=memory),
                PackedLinear(layer.gate_up, layer.gate_up_bias, quantization, gated=True, memory=memory),
                PackedLinear(layer.down, layer.down_bias, quantization, memory=memory),
            ]
            kept = [None if weight is None else weight.clone() for weight in norms]
            self._norms += [weight for weight in kept if weight is not None]
            self._packed += matrices
            blocks += [*map(address, kept), *(number for matrix in matrices for number in matrix.block)]
        self._count = len(layers)
        self._layers = ctypes.create_string_buffer(struct.pack(f"={len(blocks)}q", *blocks))
        self._norm = norm.clone()
        self.head = PackedLinear(head, memory=memory)
        self._table = None if head is embeddings else embeddings.clone()
        self._room: tuple[int, list[Tensor]] = (0, [])
        self._untapped = self._places({})
        # The arguments of the last step of a plan that stays, and what they are of.
        self._last = b""
        self._last_of: _Step | None = None

    @property
    def nbytes(self) -> int:
        tensors = [*self._norms, self._norm] if self._table is None else [*self._norms, self._norm, self._table]
        return sum(matrix.nbytes for matrix in (*self._packed, self.head)) + sum(tensor.nbytes for tensor in tensors)

    def in_panels(self, page_size: int) -> bool:
        """Whether pages of that size are to lie in panels: where the products meet the numbers as they are stored."""
        step = {torch.float32: 1, torch.bfloat16: bf16_step()}.get(self._dtype, 0)  # a product's, in depth
        return (
            step > 0
            and page_size in (16, 32, 64)
            and page_size % step == 0
            and self._sizes.head_dim % max(16, step) == 0
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding table, `[R, hidden]` in the weights' dtype, for int64 ids `[R]`."""
        return self.head.rows(ids, dtype=self._dtype) if self._table is None else self._table[ids]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[R, V]` of final hidden states `[R, hidden]`, float32: of 20 and more, bfloat16 would drop 0.06."""
        return self.head(hidden, dtype=torch.float32)

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest next token int64 `[R]` of final hidden states `[R, hidden]`, and its log-probability, float32 `[R]`."""
        return likeliest_of(self.head, hidden)

    def __call__(
        self,
        ids: Tensor,
        soft: Tensor | None,
        inverse: Tensor,
        slots: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        taps: Mapping[int, Tensor],
        wanted: tuple[Tensor, Plan] | None = None,
    ) -> Tensor:
        """Writes the rows' keys and values into the pool and returns their final, normalised hidden states `[R, hidden]`.

        Args:
            ids: int64 `[R]`; from V on, rows of `soft`.
            soft: `[P, hidden]`, or None.
            inverse: float32 `[D/2]`, contiguous: radians that a position turns each pair of a head's numbers by.
            slots: int64 `[R]`; where each row's key goes; -1: nowhere.
            k, v: `[layers, N, page_size, Hkv, D]`, contiguous, in the weights' dtype; or in panels (`whispers_kernels.panels`).
            plan: of R rows.
            taps: tensors `[R, hidden]` to fill, by layer: 0 before the first, ..., and the final states where all rows are wanted.
            wanted: the rows whose final hidden states are wanted, int64 `[W]`, ascending, and the plan of those alone; the result
                is `[W, hidden]` then.

        Raises:
            ValueError: pages in panels that do not suit.
        """
        out = torch.empty((ids if wanted is None else wanted[0]).shape[0], self._width, dtype=self._dtype)
        step = _Step(ids, inverse, slots, k, v, plan, self._working(ids.shape[0]))
        soft = None if soft is None else dense(soft)
        if taps or wanted or soft is not None or not isinstance(plan, FixedPlan):
            tapped = self._places(taps)
            block = self._arguments(step, soft, tapped, wanted)
        else:
            # The next step of the same plan differs in the result's place alone.
            if self._last_of is None or not all(map(operator.is_, step, self._last_of)):
                self._last, self._last_of = self._arguments(step, None, self._untapped, None), step
            block = self._last
        _forward.run(block[:_OUT] + struct.pack("=q", address(out)) + block[_OUT + 8 :])
        return out

    def _arguments(
        self,
        step: _Step,
        soft: Tensor | None,
        tapped: ctypes.Array[ctypes.c_char],
        wanted: tuple[Tensor, Plan] | None,
    ) -> bytes:
        """A `Forward` of csrc, without the result's place."""
        ids, inverse, slots, k, v, plan, room = step
        rows, s = ids.shape[0], self._sizes
        q_heads, kv_heads, dim = s.q_heads, s.kv_heads, s.head_dim
        panels = k.dim() == 6
        if not panels:
            check_pages(k[0], v[0], None, None)
        kind, page_kind = dtype_of(self._norm), dtype_of(k)
        tile = tile_rows(self._dtype, k.dtype, q_heads // kv_heads, dim, ids.device)
        work = plan.work(tile)
        hidden, angles, normed, qkv, q, attended, gated = room
        soft_row, soft_kind = (0, kind) if soft is None else (soft.stride(0), dtype_of(soft))
        packed = self._table is None
        table = self._table if self._table is not None else hidden
        qkv_row = (q_heads + 2 * kv_heads) * dim
        k_at = address(qkv) + q_heads * dim * qkv.element_size()
        v_at = k_at + kv_heads * dim * qkv.element_size()
        if panels:
            layouts, page_size = (k.stride(1), 0, k.stride(2), v.stride(1), 0, v.stride(2)), k.shape[4]
            if not self.in_panels(page_size):
                raise ValueError(
                    f"k, v: in panels of {page_size} tokens; accepted here: [layers, N, page_size, Hkv, D]"
                )
        else:
            layouts, page_size = (*page_layout(k[0]), *page_layout(v[0])), k.shape[2]
        return _forward.pack(
            ctypes.addressof(self._layers),
            self._count,
            address(self._norm),
            ctypes.addressof(tapped),
            *map(address, (hidden, None, normed, qkv, q, attended, gated, inverse, angles)),
            *(rows, self._width, self._intermediate, kind, k.stride(0) * k.element_size(), s.norm_eps),
            # EmbedRows
            *(address(ids), 0 if packed else address(table), address(soft), address(hidden)),
            *(rows, table.shape[0], self._width, table.stride(0), soft_row, kind, soft_kind, dtype_of(hidden)),
            # UnpackRows
            *self.head.block,
            *(address(ids), address(soft), address(hidden), rows, soft_row, soft_kind, dtype_of(hidden)),
            # RopeAndStore
            *(address(qkv), k_at, v_at, 0, 0, address(slots), address(q)),
            *(address(k), address(v), 0, 0),
            *(rows, q_heads, kv_heads, dim, page_size, qkv_row, dim, qkv_row, dim, qkv_row, dim, 0),
            *(*layouts, kind, page_kind, panels),
            # Attention
            *map(address, (q, k, v, None, None, attended, None, plan.position, plan.page_ptr, plan.pages)),
            *map(address, (plan.length, plan.key_begin, *work.tensors)),
            *(q_heads, kv_heads, dim, page_size, work.tile_rows, work.slots, q_heads * dim, dim),
            *(*layouts, kind, page_kind, panels, 0, dim**-0.5, 0.0),
            # Wanted
            *((0, -1, *[0] * 8) if wanted is None else _wanted(*wanted, tile)),
        )

    def _places(self, taps: Mapping[int, Tensor]) -> ctypes.Array[ctypes.c_char]:
        """Where the hidden states before each layer, and the last ones, go."""
        layers = range(self._count + 1)
        return ctypes.create_string_buffer(struct.pack(f"={len(layers)}q", *(address(taps.get(n)) for n in layers)))

    def _working(self, rows: int) -> list[Tensor]:
        """Room for hidden states and angles, float32, and for normed ones, qkv, q, the attended and the gated, of the most rows so far.

        In huge pages, as the weights: which of its small pages share a place in the second cache is up to chance, and costs a prefill's
        products 1 to 2 %.
        """
        if self._room[0] < rows:
            s = self._sizes
            heads = s.q_heads * s.head_dim
            widths = self._width, heads + 2 * s.kv_heads * s.head_dim, heads, heads, self._intermediate
            shapes = [(width, torch.float32) for width in (self._width, s.head_dim)] + [
                (width, self._dtype) for width in widths
            ]
            words = [-(-rows * width * dtype.itemsize // 64) * 16 for width, dtype in shapes]
            memory = Memory(4 * sum(words))
            self._room = (
                rows,
                [memory.take(n).view(t)[: rows * w].view(rows, w) for n, (w, t) in zip(words, shapes, strict=True)],
            )
        return self._room[1]


def _wanted(rows: Tensor, plan: Plan, tile: int) -> tuple[int, ...]:
    work = plan.work(tile)
    return address(rows), rows.shape[0], *map(address, (plan.position, *work.tensors)), work.slots
