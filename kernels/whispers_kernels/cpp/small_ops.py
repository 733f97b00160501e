"""The operations that treat every row alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import address, dense, dtype_of, operation

_silu_mul = operation("silu_mul", "6q")


def silu_mul(gate_up: Tensor) -> Tensor:
    kind = dtype_of(gate_up)
    gate_up = dense(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype)
    _silu_mul(address(gate_up), address(out), rows, width, gate_up.stride(0), kind)
    return out
