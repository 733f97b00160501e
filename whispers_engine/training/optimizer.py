"""AdamW over the soft prompts of all experts at once, each with a gradient clipped on its own, and the rate's schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BETAS = (0.9, 0.999)
_EPS = 1e-8


def rate_factor(step: int, steps: int, warmup: float, decay: str) -> float:
    """The share of the largest rate at a step, counted from 0: a line up, then down to zero after the last."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    left = (steps - step) / (steps - rising)
    return {"none": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[decay]


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        value: float32 `[E, ...]`, changed in place; every expert's part is optimised as if it were alone.
        clip: the largest norm of a part's gradient; None: any.
    """

    def __init__(self, value: Tensor, weight_decay: float, clip: float | None):
        self.value = value
        self.first, self.second = torch.zeros_like(value), torch.zeros_like(value)
        self._weight_decay = weight_decay
        self._clip = clip

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float, step: int, active: Tensor) -> None:
        """One step, numbered from 0, of the experts that are active (bool `[E]`)."""
        shape = (-1, *[1] * (gradient.dim() - 1))
        if self._clip is not None:
            norm = gradient.flatten(1).norm(dim=1).view(shape)
            gradient = gradient * (self._clip / norm.clamp(min=self._clip))
        mask = active.view(shape)
        self.first.copy_(torch.where(mask, self.first.lerp(gradient, 1 - _BETAS[0]), self.first))
        self.second.copy_(torch.where(mask, self.second.lerp(gradient.square(), 1 - _BETAS[1]), self.second))
        first = self.first / (1 - _BETAS[0] ** (step + 1))
        second = self.second / (1 - _BETAS[1] ** (step + 1))
        moved = self.value * (1 - rate * self._weight_decay) - rate * first / (second.sqrt() + _EPS)
        self.value.copy_(torch.where(mask, moved, self.value))
