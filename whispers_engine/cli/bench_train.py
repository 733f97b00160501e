"""`whispers bench train`: training steps beside PEFT with transformers' Trainer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .bench_common import command_line, integers, show_machine, table_of
from .common import DEFAULT_MODEL, DeviceOption, JsonOption, err, out, print_json


def train(
    context: Annotated[str | None, typer.Option("--context", help="Tokens of the contexts. Default: 100,400.")] = None,
    answer: Annotated[int, typer.Option("--answer", help="Tokens of an answer, its end of turn among them.")] = 2,
    batch: Annotated[int, typer.Option("--batch", help="Examples an expert and step.")] = 8,
    experts: Annotated[int, typer.Option("--experts", help="Experts of the run of several at once.")] = 8,
    examples: Annotated[int, typer.Option("--examples", help="Examples an epoch.")] = 32,
    steps: Annotated[int, typer.Option("--steps", help="Steps a round.")] = 4,
    rounds: Annotated[int, typer.Option("--rounds", help="How often everybody runs, in turn.")] = 3,
    model: Annotated[str, typer.Option("--model", help="Folder, hub id or built-in name.")] = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Steps of soft-prompt training over cached contexts, beside PEFT's prompt tuning in transformers' Trainer."""
    from whispers_engine.bench.train import Settings, run_train

    settings = Settings(model, device, dtype, answer, batch, steps, rounds, experts, examples)
    lengths = integers("--context", context)
    with err.status("starting") as status:
        report = run_train(
            settings,
            command_line(),
            lengths,
            lambda what: status.update(what) if err.is_terminal else err.print(what, style="dim"),
        )
    if json:
        print_json(report)
    else:
        _show(report)
    if not report["ok"]:
        raise typer.Exit(1)


def _show(report: dict[str, Any]) -> None:
    show_machine(report)
    columns = ("placement", "context", "ours, examples/s", "peft-trainer", "times", "target", "cold, times")
    several = report["experts"]
    title = f"training steps of {report['model']}, {report['dtype']}, batch {report['batch']}, answers of {report['answer']} tokens"
    table = table_of(title, *columns, f"{several} at once, examples/s", "over in turn")
    for result in report["results"]:
        if not result["ok"]:
            table.add_row(result["placement"], str(result["context"]), f"WRONG: {result['check']}")
            continue
        rates, together = result["examples_s"], result["together"]
        table.add_row(
            result["placement"],
            str(result["context"]),
            f"{rates['ours']:.1f}",
            f"{rates['peft-trainer']:.2f}",
            f"{result['peers']['peft-trainer']['ratio']:.1f}",
            "" if result["target"] is None else f"{result['target']:.0f}",
            f"{result['cold']['ratio']:.1f}",
            f"{together['examples_s']:.1f}",
            f"{together['over_in_turn']:.2f}",
        )
    out.print(table)
