"""Whether a result may be timed: how far it is from float64, and how far it may be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Ours is held to the house's rule: twice PyTorch's own error, plus the band. A peer is timed until it is plainly wrong, since leaving
# out a fast one for its rounding would flatter us.
OURS, PEER = 2.0, 8.0


class Verdict(NamedTuple):
    """Largest absolute error and what is allowed of it. NaN is never allowed."""

    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget


def judge(actual: Tensor, exact: Tensor, plain: Tensor, band: float, times: float = OURS) -> Verdict:
    """Compares a result with the exact one.

    Args:
        actual: what was computed, any float dtype.
        exact: the same in float64.
        plain: what PyTorch computes in `actual`'s dtype; its error is the measure.
        band: what rounding may add, beside half a unit in the last place of the largest result.
        times: how many times PyTorch's own error is accepted.
    """
    if actual.shape != exact.shape:
        return Verdict(float("nan"), 0.0)
    own = float((plain.double() - exact).abs().max())
    last_place = torch.finfo(actual.dtype).eps / 2 * float(exact.abs().max())
    return Verdict(float((actual.double() - exact).abs().max()), times * own + last_place + band)
