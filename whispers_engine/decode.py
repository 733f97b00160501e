"""Decode steps: the same branches again, one row each. Their plan stays on the device and moves on by itself.

While no branch comes, goes or runs out of pages, a step needs of the host one copy of ids and slots and, on a GPU, one launch: the
whole forward is a captured CUDA graph. Graphs are kept by their numbers of rows and work items, rounded up; what is over is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whispers_kernels import Plan
from whispers_kernels.ops import tile_rows
from whispers_kernels.plan import FixedPlan
from whispers_kernels.schedule import lay_out, next_boundary

from .batch import Layout, Span, Work
from .kv_cache import PagePool
from .model import Batch, Model

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PARTS_A_ROW = 48  # ranges of keys that a row can see: about 50k keys
_WARM_UPS = 2


@dataclass
class _Step:
    """A forward over tensors that stay where they are."""

    plan: FixedPlan
    batch: Batch
    inputs: Tensor  # int64 [2, R] the batch's ids and slots
    graph: torch.cuda.CUDAGraph | None = None
    hidden: Tensor | None = None  # [R, hidden] the graph's output


class Decoder:
    """Runs decode steps for a scheduler.

    Args:
        model, pool: what computes, and where.
        capture: whether to capture CUDA graphs; without, the same step runs kernel by kernel.
    """

    def __init__(self, model: Model, pool: PagePool, capture: bool):
        self._model = model
        self._pool = pool
        self._capture = capture
        self._steps: dict[tuple[int, int], _Step] = {}
        # One pool and one stream for all graphs: they never run at once, and memory is shared only among captures on one stream.
        self._memory = torch.cuda.graph_pool_handle() if capture else None
        self._side = torch.cuda.Stream(model.device) if capture else None
        self._current: _Step | None = None
        # Those of the current plan: row, positions computed, positions that the plan has pages for.
        self._spans: dict[Span, tuple[int, int, int]] = {}

    def run(self, work: list[Work]) -> tuple[Tensor, dict[Span, int]] | None:
        """Hidden states `[R, hidden]` and every span's row, as `Model.forward` gives them; None: this is no step for a decoder."""
        spans = [span for span, _ in work]
        if any(count != 1 or span.room == 0 or span.ids[span.computed] < 0 for span, count in work):
            return None
        if self._current is None or not self._moves_on(spans):
            self._current = self._load(work)
            if self._current is None:
                return None
        step = self._current
        page_size, rows = self._pool.page_size, step.plan.num_rows
        ids, slots = [0] * rows, [-1] * rows  # rows that are not there store nothing
        for span, (row, _, _) in self._spans.items():
            ids[row] = span.ids[span.computed]
            # A branch's pages lie anywhere: its next slot need not be the one after its last.
            slots[row] = span.pages[span.computed // page_size] * page_size + span.computed % page_size
        if step.inputs.device.type == "cpu":
            step.inputs.numpy()[:] = ids, slots
        else:
            step.inputs.copy_(torch.tensor([ids, slots]), non_blocking=True)
        if self._capture:
            if step.graph is None:
                self._record(step)
            assert step.graph is not None and step.hidden is not None
            step.graph.replay()
            hidden = step.hidden.clone()  # the next replay writes there again
        else:
            hidden = self._forward(step)
        self._spans = {span: (row, computed + 1, end) for span, (row, computed, end) in self._spans.items()}
        return hidden, {span: row for span, (row, _, _) in self._spans.items()}

    def _moves_on(self, spans: list[Span]) -> bool:
        """Whether these are the current plan's spans, each one token further and with room for it in pages that the plan names."""
        return len(spans) == len(self._spans) and all(
            span in self._spans and self._spans[span][1] == span.computed < self._spans[span][2] for span in spans
        )

    def _load(self, work: list[Work]) -> _Step | None:
        """Lays the step out with pages ahead, up to the next range boundary, and puts it into tensors of a fitting capacity."""
        page_size = self._pool.page_size
        for span, _ in work:
            ahead = min(next_boundary(span.begin + span.computed) - span.begin, span.room)
            while span.lease is not None and len(span.pages) < self._pool.pages_for(ahead):
                span.pages.append(span.lease.take(span.role))
        layout = Layout(work, page_size, self._model.config.vocab_size)
        grows = list(layout.segment_of.values())
        for span, segment in layout.segment_of.items():
            layout.segments[segment] = layout.segments[segment]._replace(pages=span.pages)
        plan = Plan.from_segments(layout.segments, layout.positions)
        rows = next((rows for rows in ROWS if rows >= len(layout.ids)), None)
        if rows is None:
            return None
        if (
            not self._capture
        ):  # graphs take memory, and so come in a few sizes; without them a step has the rows that there are
            rows = len(layout.ids)
        config, device = self._model.config, self._model.device
        dtypes = self._model.dtype, self._pool.k.dtype
        tile = tile_rows(self._model.impl, *dtypes, config.q_heads // config.kv_heads, config.head_dim, device)
        schedule, items = None, 0
        if tile is not None:
            length = plan.columns.length.copy()
            for span, segment in layout.segment_of.items():
                length[segment] = len(span.pages) * page_size  # cut for all the keys to come
            position = np.resize(plan.columns.position, rows)  # rows that are not there see nothing, wherever they are
            schedule = lay_out(*plan.columns._replace(position=position, length=length), tile)
            items = max(16, 1 << (len(schedule.items) - 1).bit_length())
        step = self._steps.get((rows, items))
        if step is None:
            step = self._steps[rows, items] = self._new_step(rows, items, tile)
        if not step.plan.load(plan, schedule, grows):
            return None
        self._spans = {
            span: (row, span.computed, len(span.pages) * page_size) for span, row in layout.first_row.items()
        }
        return step

    def _new_step(self, rows: int, items: int, tile: int | None) -> _Step:
        device = self._model.device
        parts = rows * _PARTS_A_ROW
        pages = 64 * rows + self._pool.pages_for(self._model.config.max_position)
        plan = FixedPlan(rows, 6 * rows + 16, pages, items, items + parts, parts, parts, tile, device)
        inputs = torch.zeros(2, rows, dtype=torch.int64, device=device)
        return _Step(plan, Batch(inputs[0], None, inputs[1], plan), inputs)

    def _forward(self, step: _Step) -> Tensor:
        hidden = self._model.forward(step.batch, self._pool)
        step.plan.advance()
        return hidden

    def _record(self, step: _Step) -> None:
        # Before a capture kernels are compiled and libraries initialised. Nothing moves on yet: a repeated step writes what it wrote.
        # On another stream than the capture's: cuBLAS has a workspace a stream, and a graph must take its own, out of its own pool.
        # Others may clear those that lie elsewhere, as every recording of torch.compile does, and free them under the graph.
        for _ in range(_WARM_UPS):
            self._model.forward(step.batch, self._pool)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._side):  # by default, one of the first device's
            hidden = self._forward(step)
        step.graph, step.hidden = graph, hidden
