"""The steps that `verify` puts to an attention: laid out as an engine lays them out, then disturbed in every way that a plan allows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Plan, Segment

FP8 = torch.float8_e4m3fn
BEFORE_EVERY_KEY = -1000


class Setting(NamedTuple):
    """All that a kernel is compiled for. Each one costs a GPU seconds, so that settings are few, and most see one step."""

    group: int  # query heads a KV head
    dim: int
    page_size: int
    kv_heads: int = 2
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    def __str__(self) -> str:
        options = {"window": self.window, "softcap": self.softcap, "scale": self.scale}
        shape = f"GQA {self.group}, D {self.dim}, pages of {self.page_size}"
        return ", ".join([shape, *(f"{name} {value}" for name, value in options.items() if value is not None)])


class Branch(NamedTuple):
    own: int  # keys of its own
    rows: int  # the last of them are this step's
    front: int = 0  # keys of a pinned soft prompt in front
    options: tuple[int, ...] = ()  # tokens of each option after it, all of them this step's


class Request(NamedTuple):
    context: int  # keys
    rows: int = 0  # the last of them are this step's
    branches: tuple[Branch, ...] = ()


@dataclass(frozen=True)
class Step:
    """A table of segments, the rows' positions, and the pool they need."""

    name: str
    segments: tuple[Segment, ...]
    positions: tuple[int, ...]
    page_size: int
    num_pages: int

    def plan(self, device: torch.device | str = "cpu") -> Plan:
        return Plan.from_segments(self.segments, self.positions, device)

    def behind(self, pages: int) -> Step:
        """The same step in a pool with so many more pages in front."""
        segments = tuple(s._replace(pages=[page + pages for page in s.pages]) for s in self.segments)
        return replace(self, segments=segments, num_pages=self.num_pages + pages)

    def keep(self, rows: Sequence[int]) -> Step:
        """The same step with only these rows (ascending) in it."""
        segments = tuple(
            segment._replace(row_begin=bisect_left(rows, segment.row_begin), row_end=bisect_left(rows, segment.row_end))
            for segment in self.segments
        )
        return replace(self, segments=segments, positions=tuple(self.positions[row] for row in rows))

    def keys(self, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        """Slots in the pool, and positions, of all keys of these segments: int64 `[K]` both."""
        none = torch.zeros(0, dtype=torch.int64)
        slots, positions = [none], [none]
        for pages, length, key_begin, _, _ in segments:
            offset = torch.arange(length)
            if length > 0:
                slots.append(torch.tensor(pages)[offset // self.page_size] * self.page_size + offset % self.page_size)
            positions.append(key_begin + offset)
        return torch.cat(slots), torch.cat(positions)

    def blocks(self) -> list[tuple[int, int, list[Segment]]]:
        """Runs of rows that see the same segments, with these: `(begin, end, segments)`."""
        cuts = {0, len(self.positions), *(cut for segment in self.segments for cut in segment[3:])}
        return [
            (begin, end, [segment for segment in self.segments if segment.row_begin <= begin < segment.row_end])
            for begin, end in pairwise(sorted(cuts))
        ]


class Inputs(NamedTuple):
    """The tensors of `committee_attention`."""

    q: Tensor  # [R, Hq, D]
    k_pages: Tensor  # [N, page_size, Hkv, D]
    v_pages: Tensor
    k_scale: Tensor | None  # [N, page_size, Hkv]
    v_scale: Tensor | None

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]

    def behind(self, pages: int) -> Inputs:
        """The same pool with so many more pages in front, as new memory is."""

        def longer(pool: Tensor | None) -> Tensor | None:
            if pool is None or pages == 0:
                return pool
            more = pool.new_empty(pages + pool.shape[0], *pool.shape[1:])
            more[pages:] = pool
            return more

        k_pages, v_pages, k_scale, v_scale = map(longer, self[1:])
        return Inputs(self.q, k_pages, v_pages, k_scale, v_scale)  # type: ignore[arg-type]

    def dequantised(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as numbers of a dtype."""

        def times(pages: Tensor, scale: Tensor | None) -> Tensor:
            return pages.to(dtype) if scale is None else (pages.double() * scale.double()[..., None]).to(dtype)

        return times(self.k_pages, self.k_scale), times(self.v_pages, self.v_scale)


def inputs(step: Step, setting: Setting, dtype: torch.dtype, fp8: bool) -> Inputs:
    """Normal values; NaN in every slot, and as its scale, that belongs to no segment with rows."""
    generator = torch.Generator().manual_seed(len(step.positions))
    shape = (step.num_pages, step.page_size, setting.kv_heads)
    stray = torch.ones(shape[:2], dtype=torch.bool)
    stray.view(-1)[step.keys([s for s in step.segments if s.row_begin < s.row_end])[0]] = False

    def poisoned(values: Tensor) -> Tensor:
        values[stray] = torch.nan
        return values

    def scales() -> Tensor | None:
        return poisoned(torch.rand(shape, generator=generator) + 0.5) if fp8 else None

    pools = [poisoned(torch.randn(*shape, setting.dim, generator=generator)).to(FP8 if fp8 else dtype) for _ in "kv"]
    q = torch.randn(len(step.positions), setting.kv_heads * setting.group, setting.dim, generator=generator)
    return Inputs(q.to(dtype), pools[0], pools[1], scales(), scales())


def lay_out(name: str, page_size: int, requests: Sequence[Request], system: int = 0, disturbed: bool = False) -> Step:
    """Rows in depth-first order, so that whoever shares a segment is consecutive. Soft prompts of one length are one expert's.

    Disturbed, a plan also names keys twice, holds empty segments in three ways and rows that see nothing in two, in any order.
    """
    segments: list[Segment] = []
    positions: list[int] = []
    numbers = count()
    pinned: dict[int, list[int]] = {}
    random = Random(0)

    def fresh(length: int) -> list[int]:
        return [next(numbers) for _ in range(-(-length // page_size))]

    def see(first_row: int, key_begin: int, length: int, pages: list[int]) -> None:
        if length > 0:
            segments.append(Segment(pages, length, key_begin, first_row, len(positions)))

    for context, context_rows, branches in requests:
        request, context_end = len(positions), system + context
        positions.extend(range(context_end - context_rows, context_end))
        for own, rows, front, options in branches:
            branch, end = len(positions), context_end + own
            positions.extend(range(end - rows, end))
            for tokens in options:
                option = len(positions)
                positions.extend(range(end, end + tokens))
                see(option, end, tokens, fresh(tokens))
            see(branch, context_end, own, fresh(own))
            if front > 0:
                if front not in pinned:
                    pinned[front] = fresh(front)
                see(branch, -front, front, pinned[front])
        see(request, system, context, fresh(context))
    see(0, 0, system, fresh(system))
    if disturbed:
        positions[len(positions) // 3] = BEFORE_EVERY_KEY
        positions.append(system)  # a row that no segment names
        rows = len(positions)
        twice = max(segments, key=lambda segment: segment.length)
        segments.append(twice._replace(row_begin=(twice.row_begin + twice.row_end) // 2))
        segments += [Segment([], 0, 0, 0, rows), Segment([0], 0, 0, 0, rows), Segment([0], 1, 0, rows, rows)]
        random.shuffle(segments)
    num_pages = next(numbers) + 2
    shuffled = random.sample(range(num_pages), num_pages)  # neighbours in a segment are strangers in the pool
    moved = tuple(segment._replace(pages=[shuffled[page] for page in segment.pages]) for segment in segments)
    return Step(name, moved, tuple(positions), page_size, num_pages)


def decode(page_size: int, branches: int, context: int) -> Step:
    """One row a branch; every other one `detached`, with a soft prompt in front."""
    own = tuple(Branch(own=1 + 7 * i % 40, rows=1, front=16 + i if i % 2 else 0) for i in range(branches))
    return lay_out(f"decode of {branches} over {context} keys", page_size, [Request(context, 0, own)])


def everything(page_size: int, small: bool = False) -> Step:
    """Continuous batching: requests of all kinds behind a system prompt, in one disturbed plan. `small`: for an interpreter."""
    branches = (Branch(24, 5), Branch(1, 1, front=16), Branch(6, 2, front=5, options=(3, 1, 2)))
    context, rows, system = (9, 4, 60) if small else (90, 30, 300)
    requests = [Request(context, rows), Request(context, 0, branches), Request(1, 1, (Branch(40, 1), Branch(3, 3)))]
    return lay_out("everything in one step", page_size, requests, system, disturbed=True)


def kinds(page_size: int, small: bool = False) -> list[Step]:
    """Every kind of step by itself."""
    size = 4 if small else 1
    suffix, detached = Branch(24, 24), Branch(4, 4, front=16)
    chosen = (Branch(6, 2, front=16, options=(3, 1, 5)), Branch(6, 6, options=(2, 4)))
    over = ((1, 700), (8, 100)) if small else ((1, 100), (8, 700), (20, 3000))
    return [
        lay_out("prefill", page_size, [Request(300 // size, 300 // size)]),
        lay_out("prefill of a chunk", page_size, [Request(420 // size, 110 // size)]),
        lay_out("branch start, suffix", page_size, [Request(300 // size, 0, (suffix,) * (2 if small else 3))]),
        lay_out(
            "branch start, detached", page_size, [Request(300 // size, 0, (detached, detached._replace(front=20)))]
        ),
        *(decode(page_size, branches, context) for branches, context in over),
        lay_out("a system prompt of three requests", page_size, [Request(70, 0, (Branch(9, 1),) * 2)] * 3, system=130),
        lay_out("options after branches", page_size, [Request(100, 0, chosen[: 1 if small else 2])]),
        lay_out("one row, one key", page_size, [Request(1, 1)]),
        everything(page_size, small),
    ]


COMMON = Setting(4, 128, 64)
ODD = Setting(3, 96, 7, window=50, softcap=5.0)
OTHERS = (
    Setting(1, 64, 16, window=40),
    Setting(2, 80, 128, softcap=20.0),
    ODD,
    Setting(8, 256, 64, kv_heads=1, scale=0.1),
    Setting(16, 128, 16, kv_heads=1),
)


class Case(NamedTuple):
    setting: Setting
    step: Step
    fp8: bool  # of the pages
    far: bool = False  # pages lie behind more entries than 32 bits count

    def alone(self) -> list[int]:
        """Rows to compute without the others: half of them, which may take another tile, so a compile; else three in four."""
        rows = range(len(self.step.positions))
        return [row for row in rows if row % (2 if self.setting == COMMON else 4)]

    def __str__(self) -> str:
        return f"{self.step.name}; {self.setting}" + (", pages beyond 2^31 entries" if self.far else "")


def attention_cases(small: bool, far: bool) -> list[Case]:
    """Every size that a kernel is compiled for occurs. `small`: for an interpreter; `far`: with far pages."""
    others = [setting._replace(kv_heads=1) if small else setting for setting in OTHERS]
    odd = others[OTHERS.index(ODD)]
    over_8 = decode(COMMON.page_size, 8, 100 if small else 700)
    return [
        *(Case(COMMON, step, False) for step in kinds(COMMON.page_size, small)),
        *(Case(setting, everything(setting.page_size, small), False) for setting in others),
        Case(COMMON, over_8, True),
        Case(odd, everything(odd.page_size, small), True),
        *([Case(COMMON, over_8, True, far=True)] if far else []),
    ]
