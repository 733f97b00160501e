"""What an Engine's "auto" stands for on a device."""

from __future__ import annotations

import torch


def auto_dtype(device: torch.device, impl: str, stored: torch.dtype) -> torch.dtype:
    """What `dtype="auto"` is: as stored on a GPU; on a CPU bfloat16 where the C++ kernels have instructions for it, else float32."""
    if device.type != "cpu":
        return stored
    if impl != "cpp":
        return torch.float32
    from whispers_kernels.cpp import bf16_step

    return torch.bfloat16 if bf16_step() else torch.float32


def auto_page_size(device: torch.device, impl: str) -> int:
    """64 on a GPU; on a CPU few, so that branches waste little of their last page: 16, or as many as its products take at a time."""
    if device.type != "cpu":
        return 64
    if impl != "cpp":
        return 16
    from whispers_kernels.cpp import bf16_step

    return max(16, bf16_step())
