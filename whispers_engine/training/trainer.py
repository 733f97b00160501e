"""The training run: all experts of a file at once, stopped one by one, continued where a kill left it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import WhispersError
from ..experts import Committee, Expert
from ..files import new_folder
from ..records import RecordFile
from . import checkpoint
from .base import Base
from .checkpoint import State
from .contexts import ContextStore
from .examples import Culture, build_cultures, pooled
from .optimizer import AdamW, rate_factor
from .prompts import first_values, virtual_tokens
from .sampler import Drawn, Sampler
from .settings import Settings
from .step import Stepper

if TYPE_CHECKING:
    from ..engine import Engine

# Settings that change how a result is computed, not which.
_FREE = ("checkpoint_seconds", "context_memory", "licence")


@dataclass(frozen=True)
class Progress:
    """How far a run is, told after every step."""

    phase: str  # "shared" or "experts"
    step: int  # of this phase, from 1
    steps: int
    loss: float  # mean over the step's examples
    dev: float | None  # mean over the experts, at the latest look
    active: int  # experts that have not stopped


@dataclass(frozen=True)
class Trained:
    """A run's result: the experts, and what `--json` prints."""

    experts: tuple[Expert, ...]
    summary: dict[str, Any]


def train(
    base: Base | Engine,
    source: RecordFile,
    out: str | Path,
    settings: Settings | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Trains an expert for every culture of a file and writes them as a committee.

    What it needs to go on after a kill lies in `OUT.training`, which the same call continues and which goes when the committee is written.

    Args:
        out: the committee's folder; must not exist.
        progress: called after every step.

    Raises:
        WhispersError: anything that is refused, before any work: an `out` that exists, records that do not fit, a culture without examples.
    """
    settings = Settings() if settings is None else settings
    base = base if isinstance(base, Base) else Base.of(base)
    out = Path(out)
    if out.exists():
        raise WhispersError(f"{out}: exists; accepted: a folder that does not")
    run = _Run(base, source, out, settings, progress)
    trained = run.result()
    with new_folder(out) as new:
        for expert in trained.experts:
            Committee.add(new, expert, base.name, base.fingerprint)
    shutil.rmtree(run.folder, ignore_errors=True)
    return trained


class _Run:
    def __init__(
        self,
        base: Base,
        source: RecordFile,
        out: Path,
        settings: Settings,
        progress: Callable[[Progress], None] | None,
    ):
        self.folder = out.with_name(out.name + ".training")
        self._base = base
        self._source = source
        self._settings = settings
        self._progress = progress
        known = (
            settings.virtual_tokens or 1
        )  # a folder to start from may say more; what is refused now is refused early
        self._cultures = self._build(known)
        self._m = virtual_tokens(base, self._cultures, settings)
        if self._m != known:
            self._cultures = self._build(self._m)
        shared = [("shared", [pooled(self._cultures)], settings.shared_steps)] if settings.shared_steps else []
        self._phases: list[tuple[str, list[Culture], int]] = [*shared, ("experts", self._cultures, settings.steps)]
        first = first_values(base, self._phases[0][1], settings, self._m)
        key = self._key()
        self._state = checkpoint.load(self.folder, key) or State(key, tensors={"value": first})
        self.folder.mkdir(parents=True, exist_ok=True)
        memory = _context_memory(base.device) if settings.context_memory is None else settings.context_memory
        self._store = ContextStore(base, memory, self.folder)
        self._stepper = Stepper(base, self._store, settings.placement, settings.kind, self._m, settings.rows_at_once)
        self._saved = self._begun = time.monotonic()
        self._seconds = float(self._state.notes.get("seconds", 0.0))

    def _build(self, m: int) -> list[Culture]:
        settings = self._settings
        return build_cultures(
            self._source,
            self._base.chat,
            self._base.config,
            wanted=settings.experts,
            virtual_tokens=m,
            dev_share=settings.dev_share,
            orders=settings.orders,
            seed=settings.seed,
        )

    def _key(self) -> dict[str, Any]:
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self._settings).items()
            if name not in _FREE
        }
        device = self._base.device.type
        return {
            "data": self._source.sha256,
            "base": self._base.fingerprint,
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "device": device,
            **settings,
        }

    def result(self) -> Trained:
        for number, (name, cultures, steps) in enumerate(self._phases):
            if number < self._state.phase:
                continue
            value = _Phase(self, name, cultures, steps).run()
            if number + 1 < len(self._phases):
                following = self._phases[number + 1][1]
                spread = value.expand(len(following), *value.shape[1:]).clone()
                ended = self._state.notes.pop("phase")
                notes = {**self._state.notes, name: ended}
                self._state = State(self._state.key, number + 1, 0, {"value": spread}, notes)
                self.save()
        notes = self._state.notes
        experts = [
            Expert(
                culture.expert,
                value[index],
                self._settings.placement,
                self._settings.kind,
                culture.name,
                self._base.fingerprint,
                self._record(index, culture, notes),
            )
            for index, culture in enumerate(self._cultures)
        ]
        return Trained(tuple(experts), self._summary(notes))

    def _record(self, index: int, culture: Culture, notes: dict[str, Any]) -> dict[str, Any]:
        phase = notes["phase"]
        return {
            "data": {"file": self._source.path.name, "sha256": self._source.sha256, "licence": self._settings.licence},
            "examples": {"train": len(culture.train), "dev": len(culture.dev)},
            "settings": {**self._key(), "virtual_tokens": self._m},
            "steps": phase["taken"][index],
            "best_step": phase["best_step"][index],
            "dev_loss": phase["best"][index],
            "curve": phase["curves"][index],
            **({"shared_curve": notes["shared"]["curves"][0]} if "shared" in notes else {}),
        }

    def _summary(self, notes: dict[str, Any]) -> dict[str, Any]:
        phase = notes["phase"]
        experts = [
            {
                "name": culture.expert,
                "culture": culture.name,
                "train": len(culture.train),
                "dev": len(culture.dev),
                "steps": phase["taken"][index],
                "best_step": phase["best_step"][index],
                "first_loss": phase["curves"][index][0]["train"],
                "last_loss": phase["curves"][index][-1]["train"],
                "dev_loss": phase["best"][index],
            }
            for index, culture in enumerate(self._cultures)
        ]
        return {
            "base": self._base.name,
            "placement": self._settings.placement,
            "kind": self._settings.kind,
            "virtual_tokens": self._m,
            "device": str(self._base.device),
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "examples": phase["examples"],
            "seconds": self.seconds,
            "contexts": self._store.computed,
            "context_bytes_in_file": self._store.bytes_in_file,
            "experts": experts,
        }

    @property
    def seconds(self) -> float:
        """Spent on this run, before a kill too."""
        return self._seconds + time.monotonic() - self._begun

    def save(self) -> None:
        self._state.notes["seconds"] = self.seconds
        checkpoint.save(self.folder, self._state)
        self._saved = time.monotonic()


class _Phase:
    """Steps over one set of soft prompts. All that it knows between two steps is in the run's state."""

    def __init__(self, run: _Run, name: str, cultures: Sequence[Culture], steps: int):
        self._run = run
        self._name = name
        self._cultures = cultures
        self._steps = steps
        settings, state, device = run._settings, run._state, run._base.device
        self._every = settings.evaluate_every or max(1, steps // 10)
        value = state.tensors["value"].to(device)
        self._optimizer = AdamW(value, settings.weight_decay, settings.clip)
        if "first" in state.tensors:
            self._optimizer.first, self._optimizer.second = (
                state.tensors[key].to(device) for key in ("first", "second")
            )
        self._best = state.tensors["best"].to(device) if "best" in state.tensors else value.clone()
        count = len(cultures)
        self._notes: dict[str, Any] = state.notes.setdefault(
            "phase",
            {
                "best": [None] * count,
                "best_step": [0] * count,
                "bad": [0] * count,
                "active": [True] * count,
                "taken": [0] * count,
                "curves": [[] for _ in range(count)],
                "sums": [0.0] * count,  # of losses since the latest look
                "counts": [0] * count,
                "examples": 0,
            },
        )
        self._sampler = Sampler([culture.train for culture in cultures], settings.batch, settings.seed)
        self._sampler.skip(state.step)
        self._dev = [
            Drawn(expert, example.prompts[0], example.shares[0])
            for expert, culture in enumerate(cultures)
            for example in culture.dev
        ]
        self._dev.sort(key=lambda drawn: (drawn.prompt.context, drawn.expert))

    def run(self) -> Tensor:
        """Takes the steps that are left; returns the best soft prompts."""
        run, notes = self._run, self._notes
        settings, state = run._settings, run._state
        dev: float | None = None
        while state.step < self._steps and any(notes["active"]):
            step = state.step
            drawn = self._sampler.next(notes["active"])
            losses, gradient = run._stepper.gradient(self._optimizer.value, drawn)
            rate = settings.rate * rate_factor(step, self._steps, settings.warmup, settings.decay)
            active = torch.tensor(notes["active"], device=gradient.device)
            self._optimizer.step(gradient, rate, step, active)
            for one, loss in zip(drawn, losses.tolist(), strict=True):
                notes["sums"][one.expert] += loss
                notes["counts"][one.expert] += 1
            notes["examples"] += len(drawn)
            notes["taken"] = [taken + on for taken, on in zip(notes["taken"], notes["active"], strict=True)]
            state.step += 1
            if state.step % self._every == 0 or state.step == self._steps:
                dev = self._look()
            if run._progress is not None:
                mean = float(losses.mean())
                run._progress(Progress(self._name, state.step, self._steps, mean, dev, sum(notes["active"])))
            if time.monotonic() - run._saved >= settings.checkpoint_seconds:
                self._keep()
        self._keep()
        return self._best

    def _look(self) -> float | None:
        """Notes the losses, on what is held out too; keeps the best soft prompts and stops who no longer improves."""
        run, notes, value = self._run, self._notes, self._optimizer.value
        drawn = [one for one in self._dev if notes["active"][one.expert]]
        sums = torch.zeros(len(self._cultures), dtype=torch.float64)
        if drawn:
            losses = run._stepper.losses(value, drawn).double()
            sums.index_add_(0, torch.tensor([one.expert for one in drawn]), losses)
        for expert, culture in enumerate(self._cultures):
            if not notes["active"][expert]:
                continue
            loss = float(sums[expert]) / len(culture.dev) if culture.dev else None
            mean = notes["sums"][expert] / max(1, notes["counts"][expert])
            notes["curves"][expert].append({"step": run._state.step, "train": mean, "dev": loss})
            notes["sums"][expert], notes["counts"][expert] = 0.0, 0
            best = notes["best"][expert]
            if loss is None or best is None or loss < best:
                notes["best"][expert], notes["best_step"][expert], notes["bad"][expert] = loss, run._state.step, 0
                self._best[expert] = value[expert]
            else:
                notes["bad"][expert] += 1
                patience = run._settings.patience
                notes["active"][expert] = patience is None or notes["bad"][expert] < patience
        known = [curve[-1]["dev"] for curve in notes["curves"] if curve and curve[-1]["dev"] is not None]
        return sum(known) / len(known) if known else None

    def _keep(self) -> None:
        state, optimizer = self._run._state, self._optimizer
        state.tensors = {
            "value": optimizer.value,
            "first": optimizer.first,
            "second": optimizer.second,
            "best": self._best,
        }
        self._run.save()


def _context_memory(device: torch.device) -> int:
    """A quarter of the machine's memory, or of what the device has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] // 2)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
