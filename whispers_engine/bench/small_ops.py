"""The other operations of a decoder layer and of sampling, beside the same formula in plain PyTorch, eager and compiled.

The formula is the definition itself where that is code which a GPU runs without waiting for the host; the other three are written here
as a user would write them for one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whispers_kernels import embed_rows, pool_logits, reference, rms_norm, rope_and_store, silu_mul

from .check import Verdict, judge
from .measure import Call, copies

_PAGE_SIZE = 64
_EPS = 1e-5
_SOFT_ROWS = 16

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Widths:
    """A model's, as far as the operations see them."""

    hidden: int
    mlp: int
    vocab: int
    q_heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    def draw(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(self.dtype)


@dataclass(frozen=True)
class OpCase:
    """One operation at one shape.

    Attributes:
        bytes: the fewest that must move: inputs once, outputs once.
        make: draws a set of inputs; it is given the first set, or None, for what all sets share.
        ours: the operation on a set, and `impl`.
        plain: the formula on a set. It takes float64 too.
        written: which inputs are written, and compared beside what is returned.
    """

    op: str
    shape: str
    dtype: torch.dtype
    bytes: int
    make: Callable[[torch.Generator, Inputs | None], Inputs]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    written: tuple[int, ...] = ()

    def sets(self, device: torch.device) -> list[Inputs]:
        """As many sets of inputs as pass the cache."""
        generator = torch.Generator(device).manual_seed(0)
        first = self.make(generator, None)
        return [first, *(self.make(generator, first) for _ in range(copies(self.bytes, device) - 1))]

    def judge(self, run: Callable[..., Any], inputs: Inputs) -> Verdict:
        """How a way to compute it compares with the formula in float64; the worst of its results."""
        exact = self._results(self.plain, tuple(_float64(value) for value in inputs))
        plain, actual = (self._results(way, tuple(_copy(value) for value in inputs)) for way in (self.plain, run))
        band = 8 * torch.finfo(torch.float32).eps
        verdicts = [judge(a, e, p, band * float(e.abs().max())) for a, e, p in zip(actual, exact, plain, strict=True)]
        return max(verdicts, key=lambda verdict: (not verdict.ok, verdict.error))

    def _results(self, run: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
        returned = run(*inputs)
        values = list(returned) if isinstance(returned, tuple) else [returned]
        return [*values, *(inputs[index] for index in self.written)]


def calls(run: Callable[..., Any], sets: list[Inputs]) -> list[Call]:
    return [partial(run, *inputs) for inputs in sets]


def op_cases(widths: Widths, rows: tuple[int, ...]) -> Iterator[OpCase]:
    """Every operation at so many rows; logits are pooled for a committee's rows, not for a prefill's."""
    for r in rows:
        for make in (_norm, _rope, _silu, _embed):
            yield make(widths, r)
        if r <= 256:
            yield _pool(widths, r)


def _norm(w: Widths, r: int) -> OpCase:
    def make(generator: torch.Generator, _: Inputs | None) -> Inputs:
        return w.draw(generator, r, w.hidden), w.draw(generator, w.hidden), w.draw(generator, r, w.hidden)

    def ours(x: Tensor, weight: Tensor, residual: Tensor, impl: str) -> Any:
        return rms_norm(x, weight, _EPS, residual, impl=impl)

    def plain(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
        return reference.add_rms_norm(x, weight, _EPS, residual)

    moved = w.dtype.itemsize * (4 * r + 1) * w.hidden
    return OpCase("rms_norm", f"{r} x {w.hidden} + residual", w.dtype, moved, make, ours, plain)


def _rope(w: Widths, r: int) -> OpCase:
    def make(generator: torch.Generator, _: Inputs | None) -> Inputs:
        angle = torch.rand(r, w.dim // 2, generator=generator, device=generator.device) * 6.28
        pages = -(-r // _PAGE_SIZE) + 1
        slots = torch.randperm(pages * _PAGE_SIZE, generator=generator, device=generator.device)[:r]
        qkv = (w.draw(generator, r, heads, w.dim) for heads in (w.q_heads, w.kv_heads, w.kv_heads))
        stores = (w.draw(generator, pages, _PAGE_SIZE, w.kv_heads, w.dim) for _ in range(2))
        return *qkv, angle.cos(), angle.sin(), slots, *stores

    def plain(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor
    ) -> Tensor:
        k_pages.view(-1, w.kv_heads, w.dim)[slots] = reference.rotate(k, cos, sin)
        v_pages.view(-1, w.kv_heads, w.dim)[slots] = v
        return reference.rotate(q, cos, sin)

    moved = w.dtype.itemsize * r * w.dim * (2 * w.q_heads + 4 * w.kv_heads) + 4 * r * w.dim + 8 * r
    shape = f"{r} x ({w.q_heads} + 2 * {w.kv_heads}) x {w.dim}"
    return OpCase("rope_and_store", shape, w.dtype, moved, make, rope_and_store, plain, written=(6, 7))


def _silu(w: Widths, r: int) -> OpCase:
    def make(generator: torch.Generator, _: Inputs | None) -> Inputs:
        return (w.draw(generator, r, 2 * w.mlp),)

    moved = w.dtype.itemsize * 3 * r * w.mlp
    return OpCase("silu_mul", f"{r} x {w.mlp}", w.dtype, moved, make, silu_mul, reference.silu_mul)


def _embed(w: Widths, r: int) -> OpCase:
    def make(generator: torch.Generator, first: Inputs | None) -> Inputs:
        # The table is far larger than any cache: the sets share it, and differ in their ids.
        table = w.draw(generator, w.vocab, w.hidden) if first is None else first[1]
        ids = torch.randint(w.vocab + _SOFT_ROWS, (r,), generator=generator, device=generator.device)
        return ids, table, w.draw(generator, _SOFT_ROWS, w.hidden)

    def plain(ids: Tensor, table: Tensor, soft: Tensor) -> Tensor:
        virtual = soft.to(table.dtype)[(ids - w.vocab).clamp(min=0)]
        return torch.where((ids < w.vocab)[:, None], table[ids.clamp(max=w.vocab - 1)], virtual)

    moved = w.dtype.itemsize * 2 * r * w.hidden + 8 * r
    return OpCase("embed_rows", f"{r} x {w.hidden}", w.dtype, moved, make, embed_rows, plain)


def _pool(w: Widths, r: int) -> OpCase:
    def make(generator: torch.Generator, _: Inputs | None) -> Inputs:
        weights = torch.rand(r, generator=generator, device=generator.device) + 0.1
        ends = torch.tensor([0, r], dtype=torch.int32, device=generator.device)
        return w.draw(generator, r, w.vocab) * 3, weights / weights.sum(), ends

    def ours(logits: Tensor, weights: Tensor, ends: Tensor, impl: str) -> Tensor:
        return pool_logits(logits, weights, ends, "mixture", impl=impl)

    def plain(logits: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        logp = logits.to(weights.dtype).log_softmax(-1)  # one group, of all rows
        return torch.logsumexp(weights.log()[:, None] + logp, dim=0, keepdim=True)

    moved = w.dtype.itemsize * r * w.vocab + 4 * w.vocab
    return OpCase("pool_logits", f"{r} x {w.vocab}, mixture", w.dtype, moved, make, ours, plain)


def _float64(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _copy(value: Tensor) -> Tensor:
    return value.clone()
