"""bfloat16 weights that come from 4 or 8 bits, in 5 or 9 again, not one bit lost: `csrc/linear_grid.h`.

A checkpoint that was quantised once, to GGUF's Q4_0, Q4_1 or Q8_0, say, and is kept in bfloat16, has 16 or 256 values at most in every 32
neighbours of a row: on a grid, rounded. What the grids were is found from the weights themselves, wherever they come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import address, operation
from .packing import PANEL

_fit_grid = operation("fit_grid", "6q")
_NUMBERS = 32  # in depth of a grid


def fit_grid(words: Tensor, outputs: int, depth: int, bits: int) -> Tensor | None:
    """The words of a bfloat16 matrix, in panels (`words_of`), as those of grids, int32.

    Args:
        bits: of a code: 4 or 8.

    Returns:
        None where a weight is on no such grid, or tiles (AMX) are not used.
    """
    width = words.numel() // -(-depth // 2)
    out = torch.empty(width * (depth // _NUMBERS) * (1 + bits), dtype=torch.int32)
    fits = torch.zeros(-(-outputs // PANEL), dtype=torch.int32)
    _fit_grid(*map(address, (words, out, fits)), outputs, depth, bits)
    return out if fits.all() else None
