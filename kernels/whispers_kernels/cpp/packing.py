"""How `csrc/linear_args.h` wants a matrix laid out: plain torch, once at load."""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUTS = 16  # outputs come in multiples of this,
PANEL = 48  # and in panels of this; the last one may be narrower
GROUP = 256  # of x's numbers, that share a scale in an int8 product
_MOST = 32767  # what their largest magnitude becomes


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale an output: `weight` is about `numbers * scale[:, None]`.

    Args:
        weight: `[N, K]`.

    Returns:
        numbers int8 `[N, K]` in [-127, 127]; scale float32 `[N]`.
    """
    scale = weight.abs().amax(1).float() / 127
    numbers = (weight.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return numbers.to(torch.int8), scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """What an int8 product rounds its input to: 256 neighbours of a row share a scale, and `x` is about `numbers * scale`.

    Args:
        x: `[R, K]`.

    Returns:
        numbers float32 `[R, K]`, whole ones in [-32767, 32767]; scale float32 `[R, K]`.
    """
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    top = groups.abs().amax(2, keepdim=True)
    factor = torch.full_like(top, _MOST) / top  # _MOST / top would be _MOST times a rounded 1 / top
    numbers = (groups * torch.where(top > 2.0**-110, factor, 0)).round()
    scale = (top * torch.tensor(1 / _MOST, dtype=torch.float32)).expand_as(groups)
    return numbers.flatten(1)[:, : x.shape[1]], scale.flatten(1)[:, : x.shape[1]]


def in_turn(gate_up: Tensor) -> Tensor:
    """Gates `[I, ...]` and ups behind each other, as 8 gates and the 8 ups of the same index in turn; zeros behind the end."""
    gates, ups = (_padded(part, OUTPUTS // 2).unflatten(0, (-1, OUTPUTS // 2)) for part in gate_up.chunk(2))
    return torch.stack([gates, ups], 1).flatten(0, 2)


def words_of(weight: Tensor) -> Tensor:
    """A matrix `[N, K]` of float32, bfloat16 or int8 as int32 words, panel by panel: see `csrc/linear_args.h`."""
    numbers = 4 // weight.element_size()
    steps = -(-weight.shape[1] // numbers)
    weight = torch.nn.functional.pad(_padded(weight, OUTPUTS), (0, steps * numbers - weight.shape[1]))
    if numbers == 4:
        weight = weight.unflatten(1, (steps, 4))[:, :, [0, 2, 1, 3]].flatten(1)
    words = weight.contiguous().view(torch.int32)  # [N, steps]
    whole = words.shape[0] // PANEL * PANEL
    panels = words[:whole].unflatten(0, (-1, PANEL)).transpose(1, 2)  # [panels, steps, 48]
    return torch.cat([panels.flatten(), words[whole:].t().flatten()])


def padded_vector(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A value an output, zeros for those that pad."""
    return _padded(values.to(dtype), OUTPUTS)


def _padded(values: Tensor, unit: int) -> Tensor:
    more = -values.shape[0] % unit
    return torch.cat([values, values.new_zeros(more, *values.shape[1:])]) if more else values
