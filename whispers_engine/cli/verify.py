"""`whispers verify`: every kernel against float64 on this machine."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from whispers_engine.errors import WhispersError

from .common import DeviceOption, ImplOption, JsonOption, err, out, print_json

if TYPE_CHECKING:
    from whispers_kernels.verify import Check, Result


def verify(
    impl: ImplOption = "auto",
    device: DeviceOption = "auto",
    only: Annotated[
        str, typer.Option("--only", help="Only checks whose operation, dtype or case holds this text.")
    ] = "",
    json: JsonOption = False,
) -> None:
    """Check every kernel against float64; status 1 if one is off by more than its budget."""
    from whispers_engine.engine import device_of as find_device

    where = find_device(device)
    if impl == "triton" and where.type == "cpu":
        # Triton chooses its interpreter when it is first imported: nothing before this line does that.
        os.environ["TRITON_INTERPRET"] = "1"
    from whispers_kernels.verify import checks, describe, left_out, versions

    try:
        chosen = [check for check in checks(impl, where) if only in check.name]
    except ValueError as error:
        raise WhispersError(str(error)) from error
    if not chosen:
        raise WhispersError(f"--only {only!r}: no check is named so; accepted: a part of a line of `whispers verify`")
    missing = left_out(chosen[0].impl, where)
    results = _run(chosen)
    ok = all(result.ok for result in results)
    if json:
        found = {"ok": ok, "device": describe(where), "versions": versions(), "left_out": missing}
        print_json({**found, "results": [result.to_dict() for result in results]})
    else:
        _show(results, missing, describe(where))
    if not ok:
        raise typer.Exit(1)


def _run(checks: Sequence[Check]) -> list[Result]:
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    results: list[Result] = []
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=len(checks))
        for check in checks:
            bar.update(task, description=check.name)
            results.extend(check.run())
            bar.advance(task)
    return results


def _show(results: Sequence[Result], missing: Sequence[str], device: str) -> None:
    table = Table(title=device, title_justify="left", title_style="bold")
    for column in ("op", "impl", "dtype", "case"):
        table.add_column(column, overflow="fold")
    for column in ("error", "budget"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for result in results:
        verdict = Text("green", "green") if result.ok else Text(": ".join(filter(None, ("red", result.note))), "red")
        numbers = (_number(result.error), _number(result.budget))
        table.add_row(result.op, result.impl, result.dtype, result.case, *numbers, verdict)
    out.print(table)
    for line in missing:
        out.print(f"not checked here: {line}", style="yellow", soft_wrap=True)
    red = sum(not result.ok for result in results)
    summary = f"{red} of {len(results)} red" if red else f"all {len(results)} green"
    out.print(
        f"{summary}; error and budget: absolute, of the entry nearest to its budget or furthest beyond it",
        soft_wrap=True,
    )


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1e}" if value else "0"
