"""A batch of branches laid out as rows: which token or virtual token each row is, where it stands, what it sees, which are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .examples import Prompt


class Branch(NamedTuple):
    """One expert answering one prompt."""

    expert: int  # row of the parameters
    prompt: Prompt


@dataclass(frozen=True)
class Layout:
    """R rows: F of soft prompts in front, then those of N branches of at most T each. Options are numbered over all branches.

    A row of the batch is a row of `source` into (soft prompts `[E m]`, then the embeddings of `ids`).
    """

    ids: Tensor  # int64: the text rows' tokens
    source: Tensor | None  # int64 [R]; None: nothing but text
    position: Tensor  # int64 [R]
    front: int  # F, at the beginning; 0: none are computed
    expert: Tensor  # int64 [N]
    grid: Tensor | None  # int64 [N, T], rows counted from F; None: every branch has T rows, in order
    flat: Tensor | None  # int64 [R - F]: where in the grid each row is
    visible: Tensor  # bool [N, T, m' + T]; m' keys in front, then the branch's own
    shape: tuple[int, int]  # N, T
    contexts: tuple[tuple[tuple[int, ...], int, int], ...]  # ids, first branch, last branch + 1
    scored: Tensor  # int64 [S]: the rows whose next token matters
    # What the options' log-probabilities are the sums of, one entry a token:
    entry_row: Tensor  # int64 [X], of `scored`
    entry_token: Tensor  # int64 [X]
    entry_option: Tensor  # int64 [X]
    whole: Tensor  # int64 [Y]: rows of `scored` whose log-normaliser is needed
    entry_whole: Tensor  # int64 [X]: which of those an entry subtracts; Y for none
    options: tuple[int, ...]  # of every branch


class _Rows:
    """Columns of the text rows and the scores, as they grow."""

    def __init__(self) -> None:
        self.source: list[int] = []
        self.ids: list[int] = []
        self.position: list[int] = []
        self.lengths: list[int] = []
        self.entries: list[tuple[int, int, int, bool]] = []  # row, token, option, normalised
        self.options: list[int] = []

    def text(self, ids: Sequence[int], begin: int, first_text: int) -> None:
        self.source.extend(range(first_text + len(self.ids), first_text + len(self.ids) + len(ids)))
        self.ids.extend(ids)
        self.position.extend(range(begin, begin + len(ids)))


def lay_out(
    branches: Sequence[Branch], placement: str, kind: str, experts: int, m: int, device: torch.device
) -> Layout:
    """Lays a batch out.

    Args:
        branches: those that share a context must be neighbours.
        experts: E, rows of the parameters.
        m: virtual tokens an expert.
    """
    rows = _Rows()
    in_front = placement != "suffix"
    front = experts * m if in_front and kind == "embeddings" else 0
    soft = experts * m if kind == "embeddings" else 0
    rows.source.extend(range(front))
    rows.position.extend(list(range(-m, 0)) * (front // m))
    masks = [_place(rows, branch, placement, m, soft) for branch in branches]
    shape = len(branches), max(rows.lengths)
    grid, flat = _grid(rows.lengths, shape[1])
    contexts, begin = [], 0
    for ids, same in groupby(branches, key=lambda branch: branch.prompt.context):
        end = begin + len(list(same))
        contexts.append((ids, begin, end))
        begin = end

    def tensor(values: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(device)

    row, token, option, normalised = (list(column) for column in zip(*rows.entries, strict=True))
    scored = sorted(set(row))
    place = {value: index for index, value in enumerate(scored)}
    whole = sorted({place[at] for at, wanted in zip(row, normalised, strict=True) if wanted})
    nth = {value: index for index, value in enumerate(whole)}
    return Layout(
        ids=tensor(rows.ids),
        source=tensor(rows.source) if soft else None,
        position=tensor(rows.position),
        front=front,
        expert=tensor([branch.expert for branch in branches]),
        grid=None if grid is None else tensor(grid),
        flat=None if flat is None else tensor(flat),
        visible=_visible(masks, shape, m if in_front else 0).to(device),
        shape=shape,
        contexts=() if placement == "prefix" else tuple(contexts),
        scored=tensor(scored),
        entry_row=tensor([place[at] for at in row]),
        entry_token=tensor(token),
        entry_option=tensor(option),
        whole=tensor(whole),
        entry_whole=tensor(
            [nth[place[at]] if wanted else len(whole) for at, wanted in zip(row, normalised, strict=True)]
        ),
        options=tuple(rows.options),
    )


def _place(rows: _Rows, branch: Branch, placement: str, m: int, soft: int) -> list[int]:
    """Adds a branch's rows and scores; returns, for each of its rows, 0 for the trunk or the number of its option."""
    expert, prompt = branch
    first, end = len(rows.source), len(prompt.context)
    trunk = list(prompt.header)
    begin = end
    if placement == "suffix":
        rows.source.extend(range(expert * m, expert * m + m))
        rows.position.extend(range(end, end + m))
        begin += m
    elif placement == "prefix":
        trunk, begin = [*prompt.context, *prompt.header], 0
    rows.text(trunk, begin, soft)
    begin += len(trunk)
    last = len(rows.source) - 1
    part = [0] * (last + 1 - first)
    base = sum(rows.options)
    for number, option in enumerate(prompt.options):
        at = len(rows.source)
        rows.text(option[:-1], begin, soft)
        part += [number + 1] * (len(option) - 1)
        # All options begin after the same row: its normaliser is the same for all, and cancels where they only compete with one another.
        rows.entries.append((last, option[0], base + number, not prompt.compete))
        rows.entries += [(at + step, token, base + number, True) for step, token in enumerate(option[1:])]
    rows.options.append(len(prompt.options))
    rows.lengths.append(len(rows.source) - first)
    return part


def _grid(lengths: list[int], widest: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    if min(lengths) == widest:
        return None, None
    size, starts = np.asarray(lengths), np.cumsum([0, *lengths[:-1]])
    offset = np.arange(widest)
    # Beyond a branch's end its last row stands again: something to compute with, seen by nobody and read by nobody.
    grid = starts[:, None] + np.minimum(offset, size[:, None] - 1)
    flat = np.flatnonzero(offset < size[:, None])
    return grid, flat


def _visible(parts: list[list[int]], shape: tuple[int, int], front: int) -> Tensor:
    """Bool `[N, T, front + T]`: rows see what is in front, the trunk so far, and their own option so far."""
    branches, widest = shape
    part = np.full((branches, widest), -1)
    for index, values in enumerate(parts):
        part[index, : len(values)] = values
    mine, theirs = part[:, :, None], part[:, None, :]
    seen = np.tril(np.ones((widest, widest), dtype=bool)) & (((theirs == mine) | (theirs == 0)) & (theirs >= 0))
    seen |= np.eye(widest, dtype=bool)  # rows that are not there see themselves, so that nothing divides by zero
    return torch.from_numpy(np.concatenate((np.ones((branches, widest, front), dtype=bool), seen), axis=2))
