"""Checkpoints: one file that is there whole or not at all, and from which a run goes on to the same bits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import WhispersError
from ..files import new_file, system_errors

FILE = "state.safetensors"
VERSION = 1  # changes with what a step computes: other versions' checkpoints are not continued


@dataclass
class State:
    """Where a run is.

    Attributes:
        key: of everything that its result depends on.
        phase, step: the next step to take.
        tensors: soft prompts, the optimiser's moments, the best soft prompts so far.
        notes: what JSON holds: curves, who has stopped, seconds.
    """

    key: dict[str, Any]
    phase: int = 0
    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, state: State) -> None:
    """Writes the state; the file before it stands until the new one is complete."""
    head = {"version": VERSION, "key": state.key, "phase": state.phase, "step": state.step, "notes": state.notes}
    with new_file(folder / FILE) as path, system_errors(path):
        tensors = {name: value.contiguous().cpu() for name, value in state.tensors.items()}
        save_file(tensors, path, metadata={"state": json.dumps(head)})


def load(folder: Path, key: dict[str, Any]) -> State | None:
    """Reads the state of a run; None where there is none yet.

    Raises:
        WhispersError: a damaged file, or one of a run with another key: names what differs.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        found = {"version": head.get("version"), **head["key"]}
        state = State(head["key"], head["phase"], head["step"], tensors, head["notes"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WhispersError(
            f"{path}: not a checkpoint: {error}; accepted: one that a training run wrote, or none"
        ) from error
    key = json.loads(json.dumps({"version": VERSION, **key}))
    other = [name for name in key if found.get(name) != key[name]]
    if other:
        name = other[0]
        raise WhispersError(
            f"{path}: of a run with {name} {found.get(name)!r}, and this one has {key[name]!r}; accepted: the same command again, or "
            f"{folder} removed"
        )
    return state
