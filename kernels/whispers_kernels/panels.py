"""Pages as `csrc/attention.h` multiplies them: in panels of 32-bit words, so that no step turns keys and values anew.

A word holds n neighbours: two bfloat16 or one float32. Keys lie as `[layers, N, Hkv, D / n, page_size, n]`, values as
`[layers, N, Hkv, page_size / n, D, n]`. It is for page sizes of 16, 32 and 64, and D a multiple of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import Memory


def empty_panels(
    layers: int, pages: int, page_size: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values, not initialised.

    In huge pages (32 rows over 2048 keys on a Xeon: 0.88 of attention's time). A page's keys and values lie beside each other, so that
    a layer takes no more than 2 MB above what its used pages need.
    """
    n = 4 // dtype.itemsize
    numbers = kv_heads * page_size * dim
    both = Memory(0).take(layers * pages * 2 * numbers // n).view(dtype).view(layers, pages, 2, numbers)
    return both[:, :, 0].unflatten(2, (kv_heads, dim // n, page_size, n)), both[:, :, 1].unflatten(
        2, (kv_heads, page_size // n, dim, n)
    )


def read_panels(k: Tensor, v: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Pages as everybody else has them: `[layers, len(pages), page_size, Hkv, D]`, copies."""
    keys = k[:, pages].permute(0, 1, 4, 2, 3, 5).flatten(4)
    values = v[:, pages].permute(0, 1, 3, 5, 2, 4).flatten(2, 3)
    return keys, values


def write_panels(
    k: Tensor, v: Tensor, layer: int, pages: Tensor, offsets: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Stores keys and values `[T, Hkv, D]` at int64 `pages` and `offsets` `[T]` of one layer."""
    n = k.shape[-1]
    k[layer, pages, :, :, offsets] = keys.unflatten(2, (-1, n)).to(k.dtype)
    v[layer, pages, :, offsets // n, :, offsets % n] = values.to(v.dtype)
