"""Which implementations the tests of the operations run, where, and in which dtypes.

The C++ kernels run on the CPU, wherever they are built, with the instruction set that WHISPERS_ISA names or the best there is.
On a machine with a GPU the Triton kernels are compiled and run there; on any other they run on the CPU under Triton's interpreter,
which cuts float32 to bfloat16 instead of rounding and multiplies the bit patterns of bfloat16: without a GPU they get no bfloat16.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from whispers_kernels import available_impls

IMPLS = ("reference", "triton", "cpp")
_SKIP = {
    "triton": pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    "cpp": pytest.mark.skipif("cpp" not in available_impls(), reason="needs the C++ kernels"),
}


def device_of(impl: str) -> torch.device:
    """Where the tests run an implementation. The tensors that a result is compared with stay on the CPU."""
    return torch.device("cuda" if impl == "triton" and torch.cuda.is_available() else "cpu")


def dtypes_of(impl: str) -> tuple[torch.dtype, ...]:
    """The dtypes that an implementation computes in here."""
    if impl == "reference":
        return (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if impl == "cpp":
        return (torch.float32, torch.bfloat16, torch.float16)
    bf16 = (torch.bfloat16,) if device_of(impl).type == "cuda" else ()
    return (torch.float32, torch.float16, *bf16)


def _parameter(impl: str, *more: Any) -> Any:
    """A test's parameters, skipped where the implementation is not here."""
    return pytest.param(impl, *more, marks=_SKIP.get(impl, ()))


every_impl = pytest.mark.parametrize("impl", [_parameter(impl) for impl in IMPLS])
every_kernel = pytest.mark.parametrize("impl", [_parameter(impl) for impl in IMPLS if impl != "reference"])
every_impl_and_dtype = pytest.mark.parametrize(
    "impl, dtype", [_parameter(impl, dtype) for impl in IMPLS for dtype in dtypes_of(impl)], ids=str
)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new tensors with NaN, so that whatever a kernel leaves unwritten shows."""

    def poisoned(make: Callable[..., Tensor], *args: Any, **keywords: Any) -> Tensor:
        made = make(*args, **keywords)
        return made.fill_(math.nan) if made.is_floating_point() else made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, partial(poisoned, getattr(torch, name)))


def untouched(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor larger than the tests would fill; on the CPU only what is written takes memory."""
    if device.type == "cuda":
        return torch.zeros(numel, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize), dtype=dtype)


def far_apart(rows: Tensor, device: torch.device) -> Tensor:
    """The same three rows, the last one more than 2^31 elements after the first, by a stride that 32 bits hold."""
    stride = 2**30 + 8
    spread = untouched(2 * stride + rows.shape[1], rows.dtype, device).as_strided(rows.shape, (stride, 1))
    assert rows.shape[0] == 3
    return spread.copy_(rows)


def with_kernels(name: str, values: dict[str, list[Any]]) -> Any:
    """Runs a test of `impl` and an argument with the values that are given for each kernel."""
    return pytest.mark.parametrize(
        f"impl, {name}", [_parameter(impl, value) for impl in values for value in values[impl]], ids=str
    )
