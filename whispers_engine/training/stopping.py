"""When an expert stops, and which of its weights are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class Watch:
    """Looks at one expert's losses on what is held out.

    A culture has few questions held out, so the lowest of several looks is low by chance too. The weights that are kept are therefore the
    latest whose losses are not above the lowest look's by more than the standard error of their difference, example by example: later
    weights have seen more and stand at a lower rate. An expert that has been above for `patience` looks in a row stops.
    A loss that is not finite is above all others; an expert whose weights are not finite stops at once.

    Args:
        patience: None: it never stops.
        notes: what `notes` gave, to go on from there.
    """

    def __init__(self, patience: int | None, notes: dict[str, Any] | None = None):
        self._patience = patience
        self.notes: dict[str, Any] = notes or {"lowest": None, "step": 0, "loss": None, "above": 0, "active": True}
        self.notes.setdefault("broken_step", None)

    @property
    def active(self) -> bool:
        return bool(self.notes["active"])

    @property
    def drawn(self) -> bool:
        """Whether its examples are computed. A broken expert's are, and thrown away: with fewer rows the others' sums could be rounded
        otherwise, and what they become must not depend on it."""
        return self.active or self.notes["broken_step"] is not None

    @property
    def step(self) -> int:
        """Of the weights that are kept; 0: none are."""
        return int(self.notes["step"])

    @property
    def loss(self) -> float | None:
        """Theirs; None where nothing is held out."""
        found: float | None = self.notes["loss"]
        return found

    def look(self, step: int, losses: Sequence[float]) -> bool:
        """Whether the weights of this step are to be kept; `losses`: of every example held out, in one order always."""
        notes, lowest = self.notes, self.notes["lowest"]
        finite = all(map(math.isfinite, losses))
        mean = math.fsum(losses) / len(losses) if losses and finite else None
        keep = finite and (mean is None or lowest is None or not _above(losses, lowest))
        if mean is not None and (lowest is None or math.fsum(losses) < math.fsum(lowest)):
            notes["lowest"] = list(losses)
        if keep:
            notes.update(step=step, loss=mean, above=0)
        else:
            notes["above"] += 1
            notes["active"] = self._patience is None or notes["above"] < self._patience
        return keep

    def stop_broken(self, step: int) -> None:
        """Stops the expert, whose weights were not finite after this step."""
        self.notes.update(active=False, broken_step=step)


def _above(losses: Sequence[float], lowest: Sequence[float]) -> bool:
    differences = [one - other for one, other in zip(losses, lowest, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count == 1:
        return mean > 0
    spread = math.fsum((one - mean) ** 2 for one in differences) / (count - 1)
    return mean > math.sqrt(spread / count)
