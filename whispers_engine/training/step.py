"""Losses of a batch and their gradient: branches in portions that fit in memory, each portion one forward over cached contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .base import Base
from .branch import forward
from .contexts import ContextStore
from .examples import Prompt
from .layout import Branch, lay_out
from .objective import branch_losses
from .sampler import Drawn

_ROWS_AT_ONCE = {"cpu": 4096, "cuda": 16384}


class Stepper:
    """Computes losses.

    Args:
        rows_at_once: of one forward; None: chosen for the device.
    """

    def __init__(self, base: Base, store: ContextStore, placement: str, kind: str, m: int, rows_at_once: int | None):
        self._base = base
        self._store = store
        self._placement = placement
        self._kind = kind
        self._m = m
        self.device = base.device
        self._rows = rows_at_once or _ROWS_AT_ONCE[base.device.type]

    def losses(self, value: Tensor, drawn: Sequence[Drawn]) -> Tensor:
        """The loss of each, float32 `[N]` on the CPU.

        Args:
            value: the soft prompts of all experts; its first dimension is what `Drawn.expert` counts.
        """
        with torch.no_grad():
            return torch.cat([self._portion(value, portion).cpu() for portion in self._portions(drawn)])

    def gradient(self, value: Tensor, drawn: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
        """The losses as `losses` gives them, and the gradient of every expert's mean loss, shaped as `value`."""
        counts = torch.bincount(torch.tensor([one.expert for one in drawn]), minlength=len(value))
        leaf = value.detach().requires_grad_()
        total, found = torch.zeros_like(value), []
        for portion in self._portions(drawn):
            losses = self._portion(leaf, portion)
            weights = (1 / counts[[one.expert for one in portion]]).to(losses.device)
            (part,) = torch.autograd.grad((losses * weights).sum(), leaf)
            total += part
            found.append(losses.detach().cpu())
        return torch.cat(found), total

    def _portion(self, value: Tensor, drawn: Sequence[Drawn]) -> Tensor:
        present = sorted({one.expert for one in drawn})
        place = {expert: index for index, expert in enumerate(present)}
        branches = [Branch(place[one.expert], one.prompt) for one in drawn]
        if len(present) < len(value):
            value = value[present]
        layout = lay_out(branches, self._placement, self._kind, len(value), self._m, self._base.device)
        contexts = [self._store.get(ids) for ids, _, _ in layout.contexts]
        hidden = forward(self._base, layout, value, contexts)
        return branch_losses(self._base, layout, hidden, branches, [one.shares for one in drawn])

    def _portions(self, drawn: Sequence[Drawn]) -> Iterator[Sequence[Drawn]]:
        begin = rows = 0
        for index, one in enumerate(drawn):
            more = self._rows_of(one.prompt)
            if rows and rows + more > self._rows:
                yield drawn[begin:index]
                begin, rows = index, 0
            rows += more
        yield drawn[begin:]

    def _rows_of(self, prompt: Prompt) -> int:
        rows = len(prompt.header) + sum(len(option) - 1 for option in prompt.options)
        return rows + {"suffix": self._m, "prefix": len(prompt.context), "detached": 0}[self._placement]
