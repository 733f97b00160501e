"""Contexts' keys and values: each computed once, alone, and kept for all epochs and all experts; beyond a bound, in a mapped file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .base import Base
from .prefill import Prefill

_ALIGN = 64  # bytes, as torch's own memory: kernels may sum in another order where data lies otherwise


class ContextStore:
    """Keys and values by a context's ids.

    A context is computed alone, so its values never depend on a batch; whether they come from memory, from the file, or are computed
    again after a restart, their bits are the same.

    Args:
        base: computes them.
        memory: bytes of the device that they may take.
        folder: where the file goes for those that find no room; None: where the system keeps temporary ones. It has no name there, and is
            gone with this object.
    """

    def __init__(self, base: Base, memory: int, folder: Path | None = None):
        self._base = base
        self._prefill = Prefill(base.model)
        self._room = memory
        self._folder = folder
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._placed: dict[tuple[int, ...], int] = {}  # byte offsets in the file
        self._file: IO[bytes] | None = None
        self._end = 0
        self.computed = 0  # contexts

    @property
    def bytes_in_file(self) -> int:
        return self._end

    def get(self, ids: Sequence[int]) -> Tensor:
        """`[layers, 2, Hkv, L, D]` on the device, in the base's dtype."""
        key = tuple(ids)
        if key in self._kept:
            return self._kept[key]
        if key in self._placed:
            return self._read(len(key), self._placed[key]).to(self._base.device)
        found = self._prefill(key)
        self.computed += 1
        if found.nbytes <= self._room:
            self._room -= found.nbytes
            self._kept[key] = found
        else:
            self._placed[key] = self._write(found)
        return found

    def _shape(self, length: int) -> tuple[int, ...]:
        config = self._base.config
        return config.num_layers, 2, config.kv_heads, length, config.head_dim

    def _write(self, value: Tensor) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  lives as long as the store
        begin = self._end
        self._end = -(-(begin + value.nbytes) // _ALIGN) * _ALIGN
        self._file.truncate(self._end)
        self._read(value.shape[3], begin).copy_(value)
        return begin

    def _read(self, length: int, begin: int) -> Tensor:
        """A part of the file as a tensor that shares its memory; the system decides what of it is in memory at a time."""
        import mmap

        assert self._file is not None
        shape = self._shape(length)
        count = torch.Size(shape).numel()
        page = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        size = begin - page + count * self._base.dtype.itemsize
        mapped = mmap.mmap(self._file.fileno(), size, offset=page)
        return torch.frombuffer(mapped, dtype=self._base.dtype, count=count, offset=begin - page).view(shape)
