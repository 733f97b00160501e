"""What a router reads of a context: its hidden states at one layer, gathered in the pass that computes the context anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Span
from .kv_cache import PagePool


class Reading:
    """The mean of a span's hidden states over some of its tokens.

    Sums are kept a page, not a span, and in float64: those of a full page are noted beside it in the pool, and a later request that finds
    the page takes its sum from there. So a cache hit reads what a miss reads, whatever part of the span was found.

    Args:
        span: the context, or a profile's text.
        layer: 0: the embeddings; n: the hidden states after layer n; the last: the final, normalised ones (transformers' `hidden_states`).
        own: for each of the span's ids, whether it counts; at least one does.
        page_size: positions a page.
    """

    def __init__(self, span: Span, layer: int, own: Sequence[bool], page_size: int):
        self.span = span
        self.layer = layer
        self._page_size = page_size
        self._own = own
        self._mask = torch.tensor(own, dtype=torch.float64)
        self._sums: Tensor | None = None  # float64 [pages, hidden]

    @property
    def done(self) -> bool:
        return not self.span.pending

    def _key(self, page: int) -> bytes:
        """Of a page's sum: the layer, and what counts. Another request may have the same tokens in other roles."""
        return b"%d " % self.layer + bytes(self._own[page * self._page_size : (page + 1) * self._page_size])

    def resume(self, pages: list[int], pool: PagePool) -> list[int]:
        """Takes the sums beside pages that were found; returns the pages up to the first that has none."""
        sums: list[Tensor] = []
        self._sums = None  # asked before, other pages may have been there
        for index, page in enumerate(pages):
            found = pool.noted(page, self._key(index))
            if found is None:
                break
            sums.append(found)
        if sums:
            self._grow(sums[0])[: len(sums)] = torch.stack(sums)
        return pages[: len(sums)]

    def add(self, hidden: Tensor, count: int, pool: PagePool) -> None:
        """Adds the span's latest `count` rows, float `[count, hidden]`; notes the sums of the pages that became full."""
        end = self.span.computed
        sums = self._grow(hidden)
        offset = torch.arange(end - count, end)
        rows = hidden.double() * self._mask[end - count : end, None].to(hidden.device)
        sums.index_add_(0, (offset // self._page_size).to(hidden.device), rows)
        for page in range((end - count) // self._page_size, end // self._page_size):
            pool.note(self.span.pages[page], self._key(page), sums[page])

    def feature(self) -> Tensor:
        """The mean, float32 `[hidden]` on the CPU."""
        assert self._sums is not None and self.done
        return (self._sums.sum(0).cpu() / self._mask.sum()).float()

    def _grow(self, like: Tensor) -> Tensor:
        if self._sums is None:
            pages = -(-len(self.span.ids) // self._page_size)
            self._sums = torch.zeros(pages, like.shape[-1], dtype=torch.float64, device=like.device)
        return self._sums
