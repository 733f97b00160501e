"""From a plan to work items: row tiles x key ranges, and the order in which a row's partial results are merged.

A fast kernel splits a row's keys, so that few rows keep a whole chip busy, and merges the parts. Where it cuts is fixed by the keys'
positions, and the merge order by the same, so that a row's bits do not depend on what else is in the step. How rows are put into
tiles, and whether a tile merges its parts itself or leaves them to a second pass, changes no bits: that is chosen for speed here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# A range has RANGE keys up to position 8 * RANGE, twice as many up to 24 * RANGE, four times up to 56 * RANGE, ...: about a sixteenth of
# the keys before it. So one row of 32k keys makes 33 ranges of 2048 keys at most, which with 8 KV heads is work for 132 multiprocessors,
# and the partial results stay small beside the keys: 33 * 4 D bytes a query head.
RANGE = 256
ALIGN = 64  # within a segment, ranges begin at multiples of this, a multiple of every kernel's key tile: no tile belongs to two ranges
# So many rows that share all their segments, or rows that make more partial results than this, merge in place.
ROWS_IN_PLACE = 128
PARTIALS_AT_MOST = 4096


Column = NDArray[np.int32]


class Columns(NamedTuple):
    """What of a plan a schedule depends on, on the host."""

    position: Column  # [R]
    length: Column  # [G]
    key_begin: Column
    row_begin: Column
    row_end: Column


class Schedule(NamedTuple):
    """The work of one attention, as int32 columns on the host. `parts` are key ranges of segments.

    An item is a tile of rows and consecutive parts. Most items have one part and leave its partial result in slots, one a row, from `slot`
    on, to be merged. One that merges `in_place` has all parts of its rows in order, folds each into those before it and finishes its rows.
    """

    items: NDArray[np.int32]  # [I, 6] row_begin, row_end, part_begin, part_end, slot, in_place; the largest first
    parts: NDArray[
        np.int32
    ]  # [P, 3] segment, first key, key after the last (or the segment's end, if that comes first)
    merge_rows: NDArray[np.int32]  # [M] rows whose partial results are merged; rows that see nothing among them
    merge_ptr: NDArray[np.int32]  # [M+1]
    merge_slots: NDArray[np.int32]  # [*] in the order of merging
    slots: int
    in_place: bool  # whether any item does


def next_boundary(position: int) -> int:
    """The first range boundary after a position. Before 0 they are multiples of RANGE."""
    if position < 0:
        return (position // RANGE + 1) * RANGE
    level = (position // (8 * RANGE) + 1).bit_length() - 1
    first, size = 8 * RANGE * ((1 << level) - 1), RANGE << level
    return first + ((position - first) // size + 1) * size


def last_boundary(position: int) -> int:
    """The last range boundary not after a position, which is not negative."""
    level = (position // (8 * RANGE) + 1).bit_length() - 1
    first, size = 8 * RANGE * ((1 << level) - 1), RANGE << level
    return first + (position - first) // size * size


def key_ranges(key_begin: int, length: int) -> list[tuple[int, int]]:
    """Cuts a segment's keys at the range boundaries; offsets `[begin, end)` in the segment.

    A cut is there as soon as a key lies behind it: keys that come later, or that a captured step leaves room for, move none.
    """
    cuts, position = [0], next_boundary(key_begin)
    while (cut := (position - key_begin) // ALIGN * ALIGN) < length:
        if cut > cuts[-1]:
            cuts.append(cut)
        position = next_boundary(position)
    return list(pairwise([*cuts, length])) if length > 0 else []


def lay_out(
    position: NDArray[np.int32],
    length: NDArray[np.int32],
    key_begin: NDArray[np.int32],
    row_begin: NDArray[np.int32],
    row_end: NDArray[np.int32],
    tile_rows: int,
) -> Schedule:
    """Makes the schedule of a plan's host columns for tiles of `tile_rows` rows."""
    rows = len(position)
    lengths, begins = length.tolist(), key_begin.tolist()
    bounds = list(zip(row_begin.tolist(), row_end.tolist(), strict=True))
    parts: list[tuple[int, int, int]] = []
    first_part: list[int] = []
    for segment, (begin, size) in enumerate(zip(begins, lengths, strict=True)):
        first_part.append(len(parts))
        parts += [(segment, lo, hi) for lo, hi in key_ranges(begin, size)]
    first_part.append(len(parts))

    def keys(part: int) -> int:
        return parts[part][2] - parts[part][1]

    blocks = _blocks(rows, bounds, [segment for segment, size in enumerate(lengths) if size > 0])
    items: list[tuple[int, int, int, int, int, int, int]] = []  # the last: keys to read
    slots = 0
    merged: list[tuple[int, int, list[int]]] = []  # blocks of rows with the parts to merge
    in_place = False
    for begin, end, segments in blocks:
        seen = [part for segment in segments for part in range(first_part[segment], first_part[segment + 1])]
        seen.sort(key=lambda part: (begins[parts[part][0]] + parts[part][1], part))
        count = end - begin
        if not seen or (count < ROWS_IN_PLACE and count * len(seen) <= PARTIALS_AT_MOST):
            merged.append((begin, end, seen))
            continue
        in_place = True
        first = len(parts)
        parts += [parts[part] for part in seen]
        for row in range(begin, end, tile_rows):
            last = min(row + tile_rows, end)
            reach = int(position[row:last].max())  # keys after it are not read
            work = sum(max(0, min(keys(part), reach - begins[parts[part][0]] - parts[part][1] + 1)) for part in seen)
            items.append((row, last, first, first + len(seen), 0, 1, work))

    # Per segment, its rows that are merged later, in runs; each part of a run has one slot a row.
    base: dict[int, int] = {}  # of a part's current run: the slot of row 0, were it in the run
    runs: dict[int, tuple[int, int]] = {}  # of a segment: its current run
    columns: list[tuple[int, int, NDArray[np.int32]]] = []
    gapless = _gapless(merged)
    for (begin, end, seen), until in zip(merged, gapless, strict=True):
        for part in seen:
            segment = parts[part][0]
            if segment not in runs or begin >= runs[segment][1]:
                first, last = runs[segment] = begin, min(until, bounds[segment][1])
                for other in range(first_part[segment], first_part[segment + 1]):
                    base[other] = slots - first
                    for row in range(first, last, tile_rows):
                        stop = min(row + tile_rows, last)
                        items.append((row, stop, other, other + 1, slots + row - first, 0, keys(other)))
                    slots += last - first
        columns.append((begin, end, np.array([base[part] for part in seen], dtype=np.int32)))

    items.sort(key=lambda item: -item[6])  # stable
    merge_rows = [np.arange(begin, end, dtype=np.int32) for begin, end, _ in columns]
    counts = [np.full(end - begin, len(first), dtype=np.int32) for begin, end, first in columns]
    merge_slots = [
        (first[None] + np.arange(begin, end, dtype=np.int32)[:, None]).ravel() for begin, end, first in columns
    ]
    none = np.zeros(0, dtype=np.int32)
    return Schedule(
        np.array([item[:6] for item in items], dtype=np.int32).reshape(-1, 6),
        np.array(parts, dtype=np.int32).reshape(-1, 3),
        np.concatenate([none, *merge_rows]),
        np.concatenate([np.zeros(1, dtype=np.int32), np.concatenate([none, *counts]).cumsum(dtype=np.int32)]),
        np.concatenate([none, *merge_slots]),
        slots,
        in_place,
    )


def _blocks(rows: int, bounds: list[tuple[int, int]], segments: list[int]) -> list[tuple[int, int, list[int]]]:
    """Runs of rows that see the same segments: `(begin, end, segments)`, covering all rows in order."""
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for segment in segments:
        begin, end = bounds[segment]
        if begin < end:
            starts.setdefault(begin, []).append(segment)
            ends.setdefault(end, []).append(segment)
    active: dict[int, None] = {}
    blocks = []
    for begin, end in pairwise(sorted({0, rows, *starts, *ends})):
        for segment in ends.get(begin, ()):
            del active[segment]
        active.update(dict.fromkeys(starts.get(begin, ())))
        blocks.append((begin, end, list(active)))
    return blocks


def _gapless(merged: list[tuple[int, int, list[int]]]) -> list[int]:
    """For each of these blocks, how far the rows from it on are in one of them without a gap."""
    until: list[int] = []
    for index in range(len(merged) - 1, -1, -1):
        end = merged[index][1]
        joined = index + 1 < len(merged) and merged[index + 1][0] == end
        until.append(until[-1] if joined else end)
    return until[::-1]
