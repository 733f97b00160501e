"""One step's rows: from a tree of spans to ids, slots and a plan (docs/architecture.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from whispers_kernels import Plan, Segment
from whispers_kernels.schedule import next_boundary

from .kv_cache import Lease, PagePool, Role
from .model import Batch, Wanted


@dataclass(eq=False)
class Span:
    """Consecutive positions with keys and values of their own: a pinned soft prompt, a context, a branch, an option.

    A span sees its ancestors whole, and itself causally. What stands in `front` of it, it and everything below it see too: a pinned soft
    prompt is no ancestor, since branches of many requests share it.
    """

    role: Role
    begin: int  # position of the first
    ids: list[int]  # token ids; -1 - j is row j of `soft`
    parent: Span | None = None
    front: Span | None = None
    soft: Tensor | None = None  # [m, hidden]
    lease: Lease | None = None  # where its pages come from
    computed: int = 0  # how many have their keys in the pages
    room: int = 0  # of a branch that generates: positions that its lease has reserved pages for
    scored: bool = False  # an option: each of its tokens predicts the next
    pages: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.begin + len(self.ids)

    @property
    def pending(self) -> int:
        return len(self.ids) - self.computed

    def wanted(self, rows: int) -> int:
        """How many of its next rows' final hidden states somebody reads, the last ones: those that predict a token."""
        if self.scored:
            return rows
        return 1 if self.role == "branch" and rows == self.pending else 0


class Work(NamedTuple):
    """The next `rows` positions of a span are to be computed. Its pages are there."""

    span: Span
    rows: int


def build_batch(
    work: list[Work], pool: PagePool, vocab_size: int, device: torch.device, all_wanted: bool = False
) -> tuple[Batch, Layout]:
    """Lays the work's rows out depth first, so that whoever shares a span is consecutive.

    Args:
        all_wanted: whether the final hidden states of all rows are, not of those alone that predict a token.
    """
    layout = Layout(work, pool.page_size, vocab_size, all_wanted)
    ids = torch.tensor(layout.ids, dtype=torch.int64).to(device, non_blocking=True)
    slots = torch.tensor(layout.slots, dtype=torch.int64).to(device, non_blocking=True)
    soft = torch.cat(layout.soft) if layout.soft else None
    plan = Plan.from_segments(layout.segments, layout.positions, device)
    wanted = None
    if len(layout.wanted) < len(layout.ids):
        rows = torch.tensor(layout.wanted, dtype=torch.int64).to(device, non_blocking=True)
        wanted = Wanted(rows, plan.of_rows(layout.wanted))
    return Batch(ids, soft, slots, plan, wanted), layout


class Layout:
    """The columns of a batch, on the host."""

    def __init__(self, work: list[Work], page_size: int, vocab_size: int, all_wanted: bool = False):
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.soft: list[Tensor] = []
        self.soft_rows = 0
        self.segments: list[Segment] = []
        self.all_wanted = all_wanted
        self.wanted: list[int] = []  # rows whose final hidden states are, in order
        self.first_row: dict[Span, int] = {}
        self.last_state: dict[Span, int] = {}  # where among those of the wanted rows a span's last one is
        self.segment_of: dict[Span, int] = {}  # the segment of a worked span's own keys
        self._counts = dict(work)
        self._children: dict[Span, list[Span]] = {}
        roots: list[Span] = []
        seen: set[Span] = set()
        for span in self._counts:
            node: Span | None = span
            while node is not None and node not in seen:
                seen.add(node)
                (roots if node.parent is None else self._children.setdefault(node.parent, [])).append(node)
                node = node.parent
        # Contexts that share pages share their first ones: sorted, they are neighbours.
        self._place_roots(sorted(roots, key=lambda root: root.pages), 0)

    def _place_roots(self, roots: list[Span], shared: int) -> None:
        """Places roots that have their first `shared` pages in common, and emits a segment for every further page run they share.

        Runs end at range boundaries: kernels cut there anyway, and so a row's bits do not depend on who shares its context.
        """
        index = 0
        while index < len(roots):
            first, run = roots[index].pages, self._next_cut(shared)
            end = index + 1
            while end < len(roots) and len(first) >= run and roots[end].pages[shared:run] == first[shared:run]:
                end += 1
            if end == index + 1:
                self._place(roots[index], shared)
            else:
                last = roots[end - 1].pages  # sorted: what the ends share, all share
                while len(first) >= (further := self._next_cut(run)) and first[run:further] == last[run:further]:
                    run = further
                row = len(self.ids)
                self._place_roots(roots[index:end], run)
                self._see(first[shared:run], (run - shared) * self.page_size, shared * self.page_size, row)
            index = end

    def _next_cut(self, pages: int) -> int:
        """The first number of whole pages beyond this one that ends at a range boundary."""
        position = next_boundary(pages * self.page_size)
        while position % self.page_size:
            position = next_boundary(position)
        return position // self.page_size

    def _place(self, span: Span, shared: int = 0) -> None:
        """Places a span's rows, then its children's, and emits the segment of its keys from page `shared` on."""
        row, count = len(self.ids), self._counts.get(span, 0)
        if count:
            self.first_row[span] = row
            self._add_rows(span, count)
        for child in self._children.get(span, ()):
            self._place(child)
        if count:
            self.segment_of[span] = len(self.segments)
        keys, skipped = span.computed + count, shared * self.page_size
        self._see(span.pages[shared : -(-keys // self.page_size)], keys - skipped, span.begin + skipped, row)
        if span.front is not None:
            self._see(span.front.pages, len(span.front.ids), span.front.begin, row)

    def _see(self, pages: list[int], length: int, key_begin: int, row: int) -> None:
        """The rows from `row` to the last one so far see these keys."""
        if length > 0:
            self.segments.append(Segment(pages, length, key_begin, row, len(self.ids)))

    def _add_rows(self, span: Span, count: int) -> None:
        rows = range(span.computed, span.computed + count)
        # Virtual tokens follow the vocabulary; each span's soft prompt follows the ones before it.
        first_soft = self.vocab_size + self.soft_rows
        new = span.ids[span.computed : span.computed + count]
        if span.soft is not None and min(new) < 0:
            new = [value if value >= 0 else first_soft - 1 - value for value in new]
            self.soft.append(span.soft)
            self.soft_rows += span.soft.shape[0]
        self.ids.extend(new)
        end, wanted = len(self.ids), count if self.all_wanted else span.wanted(count)
        if wanted:
            self.wanted.extend(range(end - wanted, end))
            self.last_state[span] = len(self.wanted) - 1
        self.positions.extend(span.begin + offset for offset in rows)
        self.slots.extend(span.pages[o // self.page_size] * self.page_size + o % self.page_size for o in rows)
