"""bfloat16 weights that come from 4 bits, in 5 again, not one bit lost: `csrc/linear_grid.h`.

A checkpoint that was quantised once, to GGUF's Q4_0 or Q4_1, say, and is kept in bfloat16, has 16 values at most in every 32 neighbours
of a row: on a grid, rounded. What the grids were is found from the weights themselves, wherever they come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import address, operation
from .packing import PANEL

_fit_grid = operation("fit_grid", "5q")
_NUMBERS, _WORDS = 32, 5  # in depth of a grid, and the words that they take an output


def fit_grid(words: Tensor, outputs: int, depth: int) -> Tensor | None:
    """The words of a bfloat16 matrix, in panels (`words_of`), as those of grids, int32; None where a weight is on none, or no AMX is used."""
    width = words.numel() // -(-depth // 2)
    out = torch.empty(width * (depth // _NUMBERS) * _WORDS, dtype=torch.int32)
    fits = torch.zeros(-(-outputs // PANEL), dtype=torch.int32)
    _fit_grid(*map(address, (words, out, fits)), outputs, depth)
    return out if fits.all() else None
