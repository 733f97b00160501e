"""What the Triton kernels share: where they run, what they refuse, and how a variant is named for compiling ahead of time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

# Chosen when a kernel is decorated, and by Triton's own library when Triton is first imported: it holds for the whole process.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Names that Triton's signatures have for the dtypes of pointers.
POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, enough to compile it without a GPU.

    Args:
        name: what tells it from the kernel's other variants, such as "bf16 D128".
        kernel: the `triton.jit` function.
        signature: Triton type of every argument that is no constexpr: "*bf16", "i32", "fp32", ...
        constexprs: value of every constexpr argument.
        num_warps, num_stages: as at launch.
        divisible: names of the arguments that are multiples of 16 (pointers: 16 bytes aligned), as a launch would find them.
        chip: the kind of chip that launches it: "sm80", "sm90", "sm100", "hip"; None: all.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = field(default=())
    chip: str | None = None


def refuse_float64(*tensors: Tensor | None) -> None:
    """Raises ValueError for float64, which the definition has and a GPU kernel has no use for."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(
                "impl='triton': float64 is computed by impl='reference' alone; accepted: float32, bfloat16, float16"
            )


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """The tensor's GPU as the current one while a kernel is launched. Raises ValueError for a CPU tensor unless interpreting."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if not INTERPRETED:
        raise ValueError(
            f"impl='triton': tensors on {tensor.device}; accepted: cuda, or any with TRITON_INTERPRET=1 set before Python starts"
        )
    return nullcontext()
