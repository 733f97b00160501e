"""Decode attention as benchmarks lay it out: E experts, one row each, over one shared context and 32 keys of each branch's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from whispers_engine.errors import WhispersError
from whispers_kernels import Plan, Segment, committee_attention

from .check import OURS, Verdict, judge
from .measure import Call, copies

OWN_KEYS = 32
PAGE_SIZE = 64


class Heads(NamedTuple):
    """A model's attention heads."""

    q: int
    kv: int
    dim: int


HEADS = {"llama-1b": Heads(32, 8, 64), "llama-8b": Heads(32, 8, 128), "llama-70b": Heads(64, 8, 128)}


def parse_heads(name: str) -> Heads:
    """A name of `HEADS`, or `QxKVxDIM` such as 16x4x64. Raises WhispersError for anything else."""
    if name in HEADS:
        return HEADS[name]
    parts = name.split("x")
    if len(parts) == 3 and all(part.isdecimal() and int(part) > 0 for part in parts):
        heads = Heads(*map(int, parts))
        if heads.q % heads.kv == 0:
            return heads
    raise WhispersError(f"--heads: {name!r}; accepted: {', '.join(HEADS)}, or QxKVxDIM such as 16x4x64")


@dataclass(frozen=True)
class DecodeShape:
    """One shape of the sweep."""

    name: str  # of the heads
    heads: Heads
    experts: int
    context: int  # shared keys
    dtype: torch.dtype

    @property
    def keys(self) -> int:
        """What one row sees."""
        return self.context + OWN_KEYS

    @property
    def bytes(self) -> int:
        """The fewest that must move: every key and value once, q in and the result out."""
        stored = self.context + self.experts * OWN_KEYS
        rows = 2 * self.experts * self.heads.q * self.heads.dim
        return self.dtype.itemsize * (2 * self.heads.dim * self.heads.kv * stored + rows)

    @property
    def flops(self) -> int:
        """Two products of a multiply and an add for each row, head and key."""
        return 4 * self.experts * self.heads.q * self.heads.dim * self.keys

    @property
    def repeated_bytes(self) -> int:
        """One set of caches that repeat the context for every expert."""
        return 2 * self.dtype.itemsize * self.heads.dim * self.heads.kv * self.experts * self.keys


class DecodeInputs:
    """Pages, queries and the plan of one shape, in as many copies as pass the cache; all copies hold the same numbers.

    Attributes:
        q: `[copies, E, Hq, D]`.
        k_pages, v_pages: `[copies, N, page_size, Hkv, D]`; the pages of a segment lie scattered, as in a pool in use.
        context_pages: of the shared keys, in order. own_pages: one for each expert.
        exact: float64 `[E, Hq, D]`.
        plain: what PyTorch's attention gives on each expert's keys, `[E, Hq, D]` in the shape's dtype.
        band: what rounding may add to an error.
    """

    def __init__(self, shape: DecodeShape, device: torch.device, seed: int = 0):
        self.shape = shape
        self.device = device
        heads, dtype, experts = shape.heads, shape.dtype, shape.experts
        number = -(-shape.context // PAGE_SIZE)
        generator = torch.Generator(device).manual_seed(seed)
        scattered = torch.randperm(number + experts, generator=torch.Generator().manual_seed(seed)).tolist()
        self.context_pages, self.own_pages = scattered[:number], scattered[number:]
        segments = [Segment(self.context_pages, shape.context, 0, 0, experts)]
        segments += [Segment([page], OWN_KEYS, shape.context, row, row + 1) for row, page in enumerate(self.own_pages)]
        self.plan = Plan.from_segments(segments, [shape.keys - 1] * experts, device)

        def random(*size: int, scale: float = 1.0) -> Tensor:
            one = torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)
            return one.expand(self.copies, *size).contiguous()

        self.copies = copies(shape.bytes, device)
        # Twice the usual spread: a few keys have most of a row's weight, so that one that is missed shows.
        self.q = random(experts, heads.q, heads.dim, scale=2.0)
        self.k_pages, self.v_pages = (random(len(scattered), PAGE_SIZE, heads.kv, heads.dim) for _ in range(2))
        self._judge_with()

    def _judge_with(self) -> None:
        q, keys = self.q[0], self.k_pages[0]
        exact = committee_attention(q.double(), keys, self.v_pages[0], self.plan, impl="reference")
        assert isinstance(exact, Tensor)
        self.exact = exact
        self.plain = torch.empty_like(q)
        for row in range(self.shape.experts):
            k, v = (self.gather(pages, row).transpose(0, 1)[None] for pages in (self.k_pages, self.v_pages))
            rows = q[row][None, :, None]  # [1, Hq, 1, D]
            self.plain[row] = F.scaled_dot_product_attention(rows, k, v, enable_gqa=True)[0, :, 0]
        # No score is larger than |q| |k| / sqrt(D): what its float32 roundings are measured in.
        score = float(q.float().norm(dim=-1).max() * keys.float().norm(dim=-1).max()) * self.shape.heads.dim**-0.5
        self.band = 4 * torch.finfo(torch.float32).eps * (1 + score) * float(self.v_pages[0].abs().max())

    def gather(self, pages: Tensor, row: int) -> Tensor:
        """All keys or values that a row sees, of the first copy, in the order of their positions: `[S + own, Hkv, D]`."""
        shared = pages[0, self.context_pages].flatten(0, 1)[: self.shape.context]
        return torch.cat((shared, pages[0, self.own_pages[row], :OWN_KEYS]))

    def judge(self, out: Tensor, times: float = OURS) -> Verdict:
        return judge(out, self.exact, self.plain, self.band, times)

    def ours(self, impl: str) -> list[Call]:
        """One call for each copy, every one returning `[E, Hq, D]`."""
        return [
            partial(committee_attention, self.q[i], self.k_pages[i], self.v_pages[i], self.plan, impl=impl)
            for i in range(self.copies)
        ]
