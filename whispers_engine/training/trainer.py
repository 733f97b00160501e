"""The training run: all experts of a file at once, stopped one by one, continued where a kill left it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Callable
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
from .phase import Phase, Progress
from .prompts import first_values, virtual_tokens
from .settings import INITS, VIRTUAL_TOKENS, Settings
from .step import Stepper

if TYPE_CHECKING:
    from ..engine import Engine

# Settings that change how a result is computed, not which.
_FREE = ("checkpoint_seconds", "context_memory", "licence")


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
        WhispersError: anything that is refused, before any work: an `out` that exists, records that do not fit, a culture without examples;
            after it, an `out` that exists by then, and experts of which no finite weights are left.
    """
    settings = Settings() if settings is None else settings
    base = base if isinstance(base, Base) else Base.of(base)
    out = Path(out)
    if out.exists():
        raise WhispersError(f"{out}: exists; accepted: a folder that does not")
    run = _Run(base, source, out, settings, progress)
    trained = run.result()
    if out.exists():
        raise WhispersError(
            f"{out}: appeared during the training, and is not replaced; accepted: the same command again "
            f"once it is moved away, which finishes at once from {run.folder}"
        )
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
        # A folder to start from says m itself, but which of its experts are meant is known only once the cultures are.
        known = settings.virtual_tokens or (VIRTUAL_TOKENS if str(settings.init) in INITS else 1)
        self._cultures = self._build(known)
        self._m = virtual_tokens(base, self._cultures, settings)
        if self._m != known:
            self._cultures = self._build(self._m)
        shared = [("shared", [pooled(self._cultures)], settings.shared_steps)] if settings.shared_steps else []
        own = [("experts", self._cultures, settings.steps)] if settings.steps else []
        self._phases: list[tuple[str, list[Culture], int]] = [*shared, *own]
        first = first_values(base, self._phases[0][1], settings, self._m)
        self._key = self._key_of(first)
        self._state = checkpoint.load(self.folder, self._key) or State(self._key, tensors={"value": first})
        self.folder.mkdir(parents=True, exist_ok=True)
        memory = _context_memory(base.device) if settings.context_memory is None else settings.context_memory
        self._store = ContextStore(base, memory, self.folder)
        self._stepper = Stepper(base, self._store, settings.placement, settings.kind, self._m, settings.rows_at_once)
        self._begun = time.monotonic()
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

    def _key_of(self, first: Tensor) -> dict[str, Any]:
        """Of everything that the result depends on; `first`: what the soft prompts start from."""
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self._settings).items()
            if name not in _FREE
        }
        if str(self._settings.init) not in INITS:  # what a folder holds can change while its name does not
            settings["init_sha256"] = hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()
        device = self._base.device.type
        return {
            "data": self._source.sha256,
            "base": self._base.fingerprint,
            "prompting": self._base.chat.content_hash,
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "device": device,
            **settings,
        }

    def result(self) -> Trained:
        for number, (name, cultures, steps) in enumerate(self._phases):
            if number < self._state.phase:
                continue
            phase = Phase(name, cultures, steps, self._settings, self._stepper, self._state, self.save, self._progress)
            value = phase.run()
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
                culture.name if self._settings.steps else None,
                self._base.fingerprint,
                self._record(index, culture, notes),
            )
            for index, culture in enumerate(self._phases[-1][1])
        ]
        return Trained(tuple(experts), self._summary(notes))

    def _record(self, index: int, culture: Culture, notes: dict[str, Any]) -> dict[str, Any]:
        phase = notes["phase"]
        return {
            "data": {"file": self._source.path.name, "sha256": self._source.sha256, "licence": self._settings.licence},
            "examples": {"train": len(culture.train), "dev": len(culture.dev)},
            "settings": {**self._key, "virtual_tokens": self._m},
            "steps": phase["taken"][index],
            "kept_step": phase["watches"][index]["step"],
            "dev_loss": phase["watches"][index]["loss"],
            "broken_step": phase["watches"][index]["broken_step"],
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
                "kept_step": phase["watches"][index]["step"],
                "first_loss": phase["curves"][index][0]["train"],
                "last_loss": phase["curves"][index][-1]["train"],
                "dev_loss": phase["watches"][index]["loss"],
                "broken_step": phase["watches"][index]["broken_step"],
            }
            for index, culture in enumerate(self._phases[-1][1])
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


def _context_memory(device: torch.device) -> int:
    """A quarter of the machine's memory, or of what the device has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] // 2)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
