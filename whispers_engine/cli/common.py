"""What the commands share: consoles, common options, an engine with progress."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from whispers_engine.engine import Engine

# What users wrote is shown as it is: nothing in it is markup.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)

DEFAULT_MODEL = "smollm2-135m-instruct"

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help=f"Folder, hub id or built-in name. Default: the committee's base, or {DEFAULT_MODEL}."
    ),
]
CommitteeOption = Annotated[Path, typer.Option("--committee", help="The committee's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16.")]
ImplOption = Annotated[str, typer.Option("--impl", help="The kernels' implementation; a named one never falls back.")]


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def pull_with_progress(name: str) -> Path:
    """Pulls a built-in base, with a bar on stderr."""
    from whispers_engine.pull import BUILT_IN, find, pull

    if name not in BUILT_IN or find(name) is not None:
        return pull(name)  # refused, or there: no bar to draw
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        return pull(name, show)


def load_engine(model: str | None, committee: Path | None, **settings: Any) -> Engine:
    """An engine for the committee's base, which is pulled first where it is a built-in one."""
    from whispers_engine.pull import BUILT_IN, find

    if model is None and committee is not None:
        from whispers_engine.experts import Committee

        model = Committee.load(committee).base_name
    name = model or DEFAULT_MODEL
    if name in BUILT_IN and find(name) is None:
        pull_with_progress(name)
    with err.status(f"loading {name}"):
        from whispers_engine.engine import Engine

        return Engine(name, committee, **settings)
