"""What the benchmarks' commands share: options, how they are read, and the parts of their tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from whispers_engine.errors import WhispersError

from .common import out

if TYPE_CHECKING:
    import torch

DtypeOption = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16, float16. auto: bfloat16 on a GPU, else float32.")
]
PeersOption = Annotated[
    str | None, typer.Option("--peers", "--vs", help="Names, with commas between. Default: all that run here.")
]


def device_named(name: str) -> torch.device:
    from whispers_engine.engine import device_of as resolve

    return resolve(name)


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    from whispers_engine.config import DTYPES

    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name not in DTYPES:
        raise WhispersError(f"--dtype {name!r}; accepted: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def integers(option: str, text: str | None) -> list[int] | None:
    numbers = names(text)
    if numbers is None:
        return None
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise WhispersError(f"{option} {text!r}; accepted: integers with commas between")
    return [int(number) for number in numbers]


def command_line() -> str:
    return " ".join(["whispers", *sys.argv[1:]])


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def show_machine(report: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    out.print(f"{report['device']}; {versions}", soft_wrap=True)
    if "ceilings" in report:
        top = report["ceilings"]
        out.print(
            f"memory gives {top['GB_s']:.4g} GB/s, a matrix product computes {top['GFLOP_s']:.4g} GFLOP/s",
            soft_wrap=True,
        )


def show_left_out(results: list[dict[str, Any]], not_begun: list[str]) -> None:
    """Every reason once, with how often."""
    reasons: dict[str, int] = {}
    for result in results:
        for name, reason in result.get("left_out", {}).items():
            reasons[f"{name}: {reason}"] = reasons.get(f"{name}: {reason}", 0) + 1
    for reason, count in reasons.items():
        out.print(f"left out, {count} of {len(results)}: {reason}", style="dim", soft_wrap=True)
    if not_begun:
        out.print(f"not begun, the time was over: {'; '.join(not_begun)}", style="dim", soft_wrap=True)


def ratio_cell(result: dict[str, Any], peer: str) -> str:
    return f"{result['peers'][peer]['ratio']:.2f}" if peer in result["peers"] else "-"
