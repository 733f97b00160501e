"""The loop: steps over one set of soft prompts, and the looks between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import WhispersError
from .checkpoint import State
from .examples import Culture
from .optimizer import AdamW, rate_factor
from .sampler import Drawn, Sampler
from .settings import Settings
from .step import Stepper
from .stopping import Watch


@dataclass(frozen=True)
class Progress:
    """How far a run is, told after every step."""

    phase: str  # "shared" or "experts"
    step: int  # of this phase, from 1
    steps: int
    loss: float  # mean over the step's examples
    dev: float | None  # mean over the experts, at the latest look
    active: int  # experts that have not stopped


class Phase:
    """Steps over one set of soft prompts. All that it knows between two steps is in `state`, which it changes.

    Args:
        name: for `Progress`.
        cultures: one for every soft prompt.
        state: at a step of this phase.
        save: writes the state.
    """

    def __init__(
        self,
        name: str,
        cultures: Sequence[Culture],
        steps: int,
        settings: Settings,
        stepper: Stepper,
        state: State,
        save: Callable[[], None],
        progress: Callable[[Progress], None] | None,
    ):
        self._name = name
        self._cultures = cultures
        self._steps = steps
        self._settings = settings
        self._stepper = stepper
        self._state = state
        self._save = save
        self._progress = progress
        self._every = settings.evaluate_every or max(1, steps // 10)
        tensors = {key: value.to(stepper.device) for key, value in state.tensors.items()}
        self._optimizer = AdamW(tensors["value"], settings.weight_decay, settings.clip)
        self._optimizer.first = tensors.get("first", self._optimizer.first)
        self._optimizer.second = tensors.get("second", self._optimizer.second)
        self._kept = tensors["kept"] if "kept" in tensors else tensors["value"].clone()
        count = len(cultures)
        fresh = {
            "watches": [None] * count,
            "taken": [0] * count,  # steps
            "curves": [[] for _ in range(count)],
            "losses": [[0.0, 0] for _ in range(count)],  # sum and number since the latest look
            "examples": 0,
        }
        self._notes: dict[str, Any] = state.notes.setdefault("phase", fresh)
        self._watches = [Watch(settings.patience, notes) for notes in self._notes["watches"]]
        self._notes["watches"] = [watch.notes for watch in self._watches]
        self._sampler = Sampler([culture.train for culture in cultures], settings.batch, settings.seed)
        self._sampler.skip(state.step)
        held_out = [
            (expert, at, Drawn(expert, example.prompts[0], example.shares[0]))
            for expert, culture in enumerate(cultures)
            for at, example in enumerate(culture.dev)
        ]
        self._dev = sorted(held_out, key=lambda item: (item[2].prompt.context, item[0], item[1]))

    def run(self) -> Tensor:
        """Takes the steps that are left; returns the soft prompts that are kept.

        Raises:
            WhispersError: names the experts of which none are, since nothing was finite at any look.
        """
        settings, state, notes = self._settings, self._state, self._notes
        saved, dev = time.monotonic(), None
        while state.step < self._steps and any(active := [watch.active for watch in self._watches]):
            drawn = self._sampler.next([watch.drawn for watch in self._watches])
            losses, gradient = self._stepper.gradient(self._optimizer.value, drawn)
            rate = settings.rate * rate_factor(state.step, self._steps, settings.warmup, settings.decay)
            self._optimizer.step(gradient, rate, state.step, torch.tensor(active, device=gradient.device))
            state.step += 1
            self._stop_broken()
            active = [watch.active for watch in self._watches]
            for one, loss in zip(drawn, losses.tolist(), strict=True):
                if active[one.expert]:
                    notes["losses"][one.expert][0] += loss
                    notes["losses"][one.expert][1] += 1
                    notes["examples"] += 1
            notes["taken"] = [taken + on for taken, on in zip(notes["taken"], active, strict=True)]
            if state.step % self._every == 0 or state.step == self._steps:
                dev = self._look()
            if self._progress is not None:
                left = sum(watch.active for watch in self._watches)
                self._progress(Progress(self._name, state.step, self._steps, float(losses.mean()), dev, left))
            if time.monotonic() - saved >= settings.checkpoint_seconds:
                self._keep()
                saved = time.monotonic()
        self._keep()
        lost = [culture.expert for culture, watch in zip(self._cultures, self._watches, strict=True) if not watch.step]
        if lost:
            raise WhispersError(
                f"{', '.join(lost)}: no weights to keep, losses or gradients were not finite from the beginning; "
                "accepted: other settings (a lower rate, say), or experts without these"
            )
        return self._kept

    def _stop_broken(self) -> None:
        """Stops who has weights that are not finite, which a gradient that is not finite always leaves, and takes back what is kept."""
        optimizer = self._optimizer
        for expert, finite in enumerate(optimizer.value.isfinite().flatten(1).all(dim=1).tolist()):
            if not finite:
                self._watches[expert].stop_broken(self._state.step)
                optimizer.value[expert] = self._kept[expert]
                optimizer.first[expert] = optimizer.second[expert] = 0.0

    def _look(self) -> float | None:
        """Notes every expert's losses, on what is held out too, and keeps its weights where they are worth it."""
        drawn = [item for item in self._dev if self._watches[item[0]].drawn]
        found: list[dict[int, float]] = [{} for _ in self._cultures]
        if drawn:
            losses = self._stepper.losses(self._optimizer.value, [one for _, _, one in drawn]).tolist()
            for (expert, at, _), loss in zip(drawn, losses, strict=True):
                found[expert][at] = loss
        for expert, watch in enumerate(self._watches):
            if not watch.active:
                continue
            dev = [loss for _, loss in sorted(found[expert].items())]
            total, count = self._notes["losses"][expert]
            self._notes["losses"][expert] = [0.0, 0]
            if watch.look(self._state.step, dev):
                self._kept[expert] = self._optimizer.value[expert]
            point = {
                "step": self._state.step,
                "train": total / max(1, count),
                "dev": sum(dev) / len(dev) if dev and all(map(math.isfinite, dev)) else None,
            }
            self._notes["curves"][expert].append(point)
        known = [curve[-1]["dev"] for curve in self._notes["curves"] if curve and curve[-1]["dev"] is not None]
        return sum(known) / len(known) if known else None

    def _keep(self) -> None:
        optimizer = self._optimizer
        self._state.tensors = {
            "value": optimizer.value,
            "first": optimizer.first,
            "second": optimizer.second,
            "kept": self._kept,
        }
        self._save()
