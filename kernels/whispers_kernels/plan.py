"""The plan of one step: which rows see which pages. Everything that tells prefill, branch start and decode apart is in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch


class Segment(NamedTuple):
    """Consecutive keys in pages, and the consecutive rows that see them."""

    pages: Sequence[int]  # key j lies in pages[j // page_size] at offset j % page_size
    length: int  # keys
    key_begin: int  # position of the first key; negative for a soft prompt in front
    row_begin: int  # rows [row_begin, row_end) see the segment
    row_end: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The segments and row positions of one step, as int32 tensors on one device.

    Row `i` of segment `g` sees its key `j` iff `key_begin[g] + j <= position[i]`; with a window, also `> position[i] - window`.
    The last two fields are known on the host, so that a plan is checked against a pool without reading the device.
    """

    position: torch.Tensor  # [R]
    page_ptr: torch.Tensor  # [G+1]  segment g's pages are pages[page_ptr[g] : page_ptr[g+1]]
    pages: torch.Tensor  # [page_ptr[G]]
    length: torch.Tensor  # [G]
    key_begin: torch.Tensor  # [G]
    row_begin: torch.Tensor  # [G]
    row_end: torch.Tensor  # [G]
    pages_needed: int  # 1 + the largest page named: a pool must hold at least as many
    page_size_needed: int  # the smallest page size with which every segment's keys fit into its pages

    @property
    def num_rows(self) -> int:
        return self.position.shape[0]

    @property
    def num_segments(self) -> int:
        return self.length.shape[0]

    @classmethod
    def from_segments(
        cls,
        segments: Sequence[Segment | tuple[Sequence[int], int, int, int, int]],
        positions: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Plan:
        """Builds a plan from `(pages, length, key_begin, row_begin, row_end)` tuples and one position a row.

        Raises:
            ValueError: a negative page or length, a length without pages, or rows outside `[0, len(positions)]`; names the segment.
        """
        table = [Segment(*segment) for segment in segments]
        rows = len(positions)
        pages_needed, page_size_needed, page_ptr = 0, 1, [0]
        for index, segment in enumerate(table):
            if segment.length < 0 or (segment.length > 0 and not segment.pages):
                raise ValueError(
                    f"segment {index}: length {segment.length} with {len(segment.pages)} pages; accepted: at least 0, and pages for it"
                )
            if not 0 <= segment.row_begin <= segment.row_end <= rows:
                raise ValueError(
                    f"segment {index}: rows [{segment.row_begin}, {segment.row_end}) lie outside the step's [0, {rows})"
                )
            if segment.pages:
                if min(segment.pages) < 0:
                    raise ValueError(f"segment {index}: page {min(segment.pages)} is negative")
                pages_needed = max(pages_needed, 1 + max(segment.pages))
                page_size_needed = max(page_size_needed, -(-segment.length // len(segment.pages)))
            page_ptr.append(page_ptr[-1] + len(segment.pages))

        def column(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)

        return cls(
            position=column(list(positions)),
            page_ptr=column(page_ptr),
            pages=column(list(chain.from_iterable(segment.pages for segment in table))),
            length=column([segment.length for segment in table]),
            key_begin=column([segment.key_begin for segment in table]),
            row_begin=column([segment.row_begin for segment in table]),
            row_end=column([segment.row_end for segment in table]),
            pages_needed=pages_needed,
            page_size_needed=page_size_needed,
        )
