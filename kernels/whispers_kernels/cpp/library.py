"""The shared library that `setup.py` builds from `csrc/`, loaded once; which of its instruction sets runs, and on how many threads.

Functions of a library loaded by ctypes run without the GIL. Each takes one block of 8-byte numbers, a struct of `csrc/args.h`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct
from functools import cache

import torch
from torch import Tensor


class Unavailable(ImportError):
    """There are no C++ kernels on this machine; the message says why."""


def _load() -> ctypes.CDLL:
    found = importlib.util.find_spec("whispers_kernels._C")
    if found is None or found.origin is None:
        raise Unavailable("the extension whispers_kernels._C was not built: install with a C++17 compiler at hand")
    try:
        return ctypes.CDLL(found.origin)
    except OSError as error:
        raise Unavailable(f"the extension whispers_kernels._C does not load: {error}") from error


def _isas(library: ctypes.CDLL) -> tuple[str, ...]:
    names = ctypes.create_string_buffer(256)
    library.whispers_isas(names, ctypes.c_int64(len(names)))
    return tuple(names.value.decode().split())


def _choose(library: ctypes.CDLL, here: tuple[str, ...]) -> str:
    """The best instruction set, or the one that the environment names.

    Raises:
        Unavailable: a processor without any of them.
        ValueError: WHISPERS_ISA names one that is not here.
    """
    if not here:
        raise Unavailable("the processor has no AVX2 with FMA and F16C")
    wanted = os.environ.get("WHISPERS_ISA") or here[0]
    if library.whispers_choose(wanted.encode()) != 0:
        raise ValueError(f"WHISPERS_ISA={wanted!r} is not available here; accepted: {', '.join(here)}")
    return wanted


MOST_THREADS = 4096  # more than any machine has cores: a slip

_LIBRARY = _load()
_ISAS = _isas(_LIBRARY)
_ISA = _choose(_LIBRARY, _ISAS)
_LIBRARY.whispers_threads.restype = ctypes.c_int64


def isas() -> tuple[str, ...]:
    """Names of the instruction sets that this machine has, the best first: of amx, avx512_bf16, avx512 and avx2."""
    return _ISAS


def isa() -> str:
    """The one that is used: the best, or what WHISPERS_ISA named when this package was imported."""
    return _ISA


def bf16_step() -> int:
    """How many neighbours in depth its products of bf16 by bf16 take at a time; 0: it has no instruction for them."""
    return {"amx": 32, "avx512_bf16": 2}.get(_ISA, 0)


def num_threads() -> int:
    """How many threads compute together."""
    return int(_LIBRARY.whispers_threads())


def set_num_threads(threads: int) -> None:
    """Sets it, for forked processes too; at import it is `torch.get_num_threads()`. Where the system starts fewer, it is those.

    Raises:
        ValueError: less than one, or more than `MOST_THREADS`.
    """
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads: {threads}; accepted: 1 to {MOST_THREADS}")
    _LIBRARY.whispers_set_threads(ctypes.c_int64(threads))


set_num_threads(min(torch.get_num_threads(), MOST_THREADS))


class Operation:
    """A function of the library, called with the numbers of its struct: in `layout`, "q" is an integer or a pointer, "d" a float."""

    def __init__(self, name: str, layout: str):
        self._name = name
        self._function = _LIBRARY[f"whispers_{name}"]
        self._function.argtypes = [ctypes.c_char_p]
        self.pack = struct.Struct(f"={layout}").pack

    def __call__(self, *numbers: float) -> None:
        self.run(self.pack(*numbers))

    def run(self, block: bytes) -> None:
        """With a struct that is packed already. Raises MemoryError."""
        if self._function(block) != 0:
            raise MemoryError(f"impl='cpp': no memory for what {self._name} works in")


@cache
def operation(name: str, layout: str) -> Operation:
    """The function of that name."""
    return Operation(name, layout)


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FP8 = 3  # of pages alone: nothing else is read as such


def dtype_of(tensor: Tensor) -> int:
    """The number that `csrc/types.h` gives its dtype.

    Raises:
        ValueError: float64, or what only pages may be.
    """
    if tensor.dtype not in _DTYPES:
        found = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"impl='cpp': {found} is not computed; accepted: float32, bfloat16, float16")
    return _DTYPES[tensor.dtype]


def page_dtype_of(pages: Tensor) -> int:
    """The same of pages, which may be float8_e4m3fn."""
    return _FP8 if pages.dtype == torch.float8_e4m3fn else dtype_of(pages)


def address(tensor: Tensor | None) -> int:
    """Of its first element; 0: none."""
    return 0 if tensor is None else tensor.data_ptr()


def dense(tensor: Tensor) -> Tensor:
    """With a last dimension whose elements are neighbours: the tensor itself, or a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def page_layout(pages: Tensor) -> tuple[int, int, int]:
    """Strides of its pages, tokens and heads."""
    page, token, head, _ = pages.stride()
    return page, token, head


def check_pages(k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Refuses pools that the kernels do not read in place.

    Raises:
        ValueError: heads whose numbers are not neighbours, scales that are not contiguous.
    """
    for name, store in (("k_pages", k_pages), ("v_pages", v_pages)):
        if store.stride(3) != 1 and store.shape[3] > 1:
            raise ValueError(f"impl='cpp': {name}: strides {store.stride()}; accepted: the last one 1")
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if factor is not None and not factor.is_contiguous():
            raise ValueError(f"impl='cpp': {name}: strides {factor.stride()}; accepted: a contiguous tensor")
