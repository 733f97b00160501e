"""Keys and values of a context by the engine's own forward, so that training sees bit for bit what answering sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Span, Work, build_batch
from ..kv_cache import PagePool
from ..model import Model

_PAGE = 16
_ROWS = {"cpu": 512, "cuda": 8192}  # a step, as the engine's default


class Prefill:
    """Computes contexts, each alone.

    Args:
        model: the decoder; its kernels are the engine's.
    """

    def __init__(self, model: Model):
        self._model = model
        self._pool: PagePool | None = None

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Keys (rotated, the first at position 0) and values: `[layers, 2, Hkv, L, D]` in the model's dtype."""
        if self._model.impl != "cpp":
            return self._compute(ids)
        # PyTorch's threads go on spinning behind each of its operations, on the cores that the kernels want.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._compute(ids)
        finally:
            torch.set_num_threads(threads)

    def _compute(self, ids: Sequence[int]) -> Tensor:
        model, length = self._model, len(ids)
        pool = self._room_for(length)
        span = Span("context", 0, list(ids), pages=list(range(pool.pages_for(length))))
        while span.pending:
            work = [Work(span, min(span.pending, _ROWS[model.device.type]))]
            batch, _ = build_batch(work, pool, model.config.vocab_size, model.device)
            model.forward(batch, pool)
            span.computed += work[0].rows
        found = [store.flatten(1, 2)[:, :length].transpose(1, 2) for store in pool.read(span.pages)]
        return torch.stack(found, dim=1)

    def _room_for(self, length: int) -> PagePool:
        if self._pool is None or self._pool.num_pages * _PAGE < length:
            self._pool = self._model.new_pool(-(-length // _PAGE), _PAGE)
        return self._pool
