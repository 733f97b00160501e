"""Values and error budgets that the tests of the small operations share."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(
    *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """The same values on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def assert_rounded_once(actual: Tensor, exact: Tensor, size: Tensor | None = None) -> None:
    """Half a unit in the last place, plus eight float32 (float64) roundings of numbers of this `size` (default: the result's)."""
    actual, exact, size = actual.cpu(), exact.cpu(), None if size is None else size.cpu()
    info = torch.finfo(actual.dtype)
    inner = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps / 2
    bound = info.eps / 2 * exact.abs() + 8 * inner * (exact if size is None else size).abs()
    excess = (actual.double() - exact).abs() - bound - info.smallest_normal * info.eps
    assert exact.dtype == torch.float64 and actual.shape == exact.shape
    assert bool((excess <= 0).all()), f"beyond the budget by {excess.max()}"
