"""What a router reads of a context: its hidden states at one layer, gathered in the pass that computes the context anyway."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .batch import Span
from .kv_cache import PagePool

_LARGEST = 300.0  # of a token's score: its exponential, and the sum of any context's, stay finite in float64


@dataclass(frozen=True, eq=False)
class Reader(ABC):
    """What is added up over the tokens that count, and what becomes of the sum. Every token's part depends on its own row alone.

    Args:
        layer: 0: the embeddings; n: the hidden states after layer n; the last: the final, normalised ones (transformers' `hidden_states`).
    """

    layer: int

    @property
    @abstractmethod
    def key(self) -> str:
        """Names it: what two readers with the same key make of a text is the same."""

    @abstractmethod
    def rows(self, hidden: Tensor) -> Tensor:
        """Of pages' hidden states `[pages, page_size, hidden]`, zeros where they have no row yet: what is added up, float64
        `[pages, page_size, width]`. A row's bits may depend on its place in its page, not on the other rows."""

    @abstractmethod
    def feature(self, total: Tensor, count: int) -> Tensor:
        """Of the sum over `count` tokens, float64 `[width]`: the feature, float32."""


@dataclass(frozen=True, eq=False)
class MeanReader(Reader):
    """The mean hidden state."""

    @property
    def key(self) -> str:
        return str(self.layer)

    def rows(self, hidden: Tensor) -> Tensor:
        return hidden.double()

    def feature(self, total: Tensor, count: int) -> Tensor:
        return (total / count).float()


@dataclass(frozen=True, eq=False)
class TokenReader(Reader):
    """The log of the sum of what every token says: a linear score an expert, exponentiated. One token that names a place decides, however
    many others name none. Last in the feature stands the log of how many tokens there are.

    Args:
        weight: float32 `[scores, hidden + 1]`, the bias last.
    """

    weight: Tensor

    @cached_property
    def key(self) -> str:
        return f"{self.layer} {hashlib.sha256(self.weight.numpy().tobytes()).hexdigest()[:16]}"

    @cached_property
    def _on(self) -> dict[torch.device, Tensor]:
        return {}

    def rows(self, hidden: Tensor) -> Tensor:
        if hidden.device not in self._on:
            self._on[hidden.device] = self.weight.T.contiguous().to(hidden.device)
        weight = self._on[hidden.device]
        # Page by page: a matrix library's bits depend on the number of rows, and how many come in a step is another matter in a hit.
        scores = [torch.addmm(weight[-1], page, weight[:-1]) for page in hidden.float()]
        return torch.stack(scores).double().clamp_(max=_LARGEST).exp_()

    def feature(self, total: Tensor, count: int) -> Tensor:
        return torch.cat([total.clamp_min(1e-300), total.new_tensor([count])]).log().float()


class Reading:
    """A reader's sum over some of a span's tokens.

    Sums are kept a page, not a span, and in float64: those of a full page are noted beside it in the pool, and a later request that finds
    the page takes its sum from there. So a cache hit reads what a miss reads, whatever part of the span was found. A page's rows are
    always read at their places in a whole page, and added in their order: the bits do not depend on the steps that they came in.

    Args:
        span: the context, or a profile's text.
        reader: what is added up.
        own: for each of the span's ids, whether it counts; at least one does.
        page_size: positions a page.
    """

    def __init__(self, span: Span, reader: Reader, own: Sequence[bool], page_size: int):
        self.span = span
        self.reader = reader
        self._page_size = page_size
        self._own = own
        self._mask = torch.tensor(own, dtype=torch.bool)
        self._sums: Tensor | None = None  # float64 [pages, width]

    @property
    def layer(self) -> int:
        return self.reader.layer

    @property
    def done(self) -> bool:
        return not self.span.pending

    def _key(self, page: int) -> bytes:
        """Of a page's sum: the reader, and what counts. Another request may have the same tokens in other roles."""
        return self.reader.key.encode() + b" " + bytes(self._own[page * self._page_size : (page + 1) * self._page_size])

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
        end, size = self.span.computed, self._page_size
        begin = end - count
        first, last = begin // size, -(-end // size)  # pages
        whole = hidden.new_zeros((last - first) * size, hidden.shape[1])
        whole[begin - first * size : end - first * size] = hidden[:count]
        rows = self.reader.rows(whole.unflatten(0, (-1, size))).flatten(0, 1)
        own = self._mask[begin:end].nonzero()[:, 0] + begin
        sums = self._grow(rows)
        sums.index_add_(0, (own // size).to(hidden.device), rows[(own - first * size).to(hidden.device)])
        for page in range(first, end // size):
            pool.note(self.span.pages[page], self._key(page), sums[page])

    def feature(self) -> Tensor:
        """The reader's feature, float32 on the CPU."""
        assert self._sums is not None and self.done
        return self.reader.feature(self._sums.sum(0).cpu(), int(self._mask.sum()))

    def _grow(self, like: Tensor) -> Tensor:
        if self._sums is None:
            pages = -(-len(self.span.ids) // self._page_size)
            self._sums = torch.zeros(pages, like.shape[-1], dtype=torch.float64, device=like.device)
        return self._sums


class Gathering(Reading):
    """A reading that keeps the rows themselves, for a trainer. What the pool has is taken only where no token counts."""

    def __init__(self, span: Span, layer: int, own: Sequence[bool], page_size: int):
        super().__init__(span, MeanReader(layer), own, page_size)
        self._found: list[Tensor] = []

    def resume(self, pages: list[int], pool: PagePool) -> list[int]:
        return pages[: self._own.index(True) // self._page_size]

    def add(self, hidden: Tensor, count: int, pool: PagePool) -> None:
        end = self.span.computed
        self._found.append(hidden[self._mask[end - count : end].to(hidden.device)].float().cpu())

    def feature(self) -> Tensor:
        """The hidden states of the tokens that count, float32 `[tokens, hidden]` on the CPU."""
        return torch.cat(self._found)
