"""`whispers bench decode`, `prefill` and `throughput`: a real base beside transformers and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_common import command_line, integers, names, ratio_cell, show_left_out, show_machine, table_of
from .common import DEFAULT_MODEL, DeviceOption, DtypeOption, ImplOption, JsonOption, err, out, print_json

if TYPE_CHECKING:
    from whispers_engine.bench.base import Progress, Report, Settings

ModelOption = Annotated[str, typer.Option("--model", help="Folder, hub id or built-in name.")]
VsOption = Annotated[
    str | None,
    typer.Option(
        "--vs",
        help="transformers, llama.cpp, or single ones such as llama.cpp-bf16, with commas between. Default: all.",
    ),
]
QuantizationOption = Annotated[str | None, typer.Option("--quantization", help="The Engine's.")]
ContextOption = Annotated[str | None, typer.Option("--context", help="Tokens of the shared context.")]
RoundsOption = Annotated[int, typer.Option("--rounds", help="How often everybody runs, in turn.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw the milliseconds, PNG or SVG.")]


_TITLES = {"decode_step": "decode steps", "prefill": "prefill", "answer": "whole answers"}


def decode(
    vs: VsOption = None,
    experts: Annotated[str | None, typer.Option(help="Experts. With --context: every pair of both.")] = None,
    context: ContextOption = None,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    impl: ImplOption = "auto",
    quantization: QuantizationOption = None,
    rounds: RoundsOption = 5,
    steps: Annotated[int, typer.Option("--steps", help="Decode steps a round.")] = 8,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Decode steps of E experts over one shared context, on a real base.

    Default: 1 and 8 experts over 512 tokens, 1, 8 and 32 over 2048; 16 private tokens each.
    """
    from whispers_engine.bench import base

    settings = base.Settings(model, device, dtype, impl, quantization, names(vs), rounds, steps)
    sizes = integers("--experts", experts), integers("--context", context)
    _measure(settings, plot, json, lambda tell: base.run_decode(settings, command_line(), *sizes, progress=tell))


def prefill(
    vs: VsOption = None,
    context: ContextOption = None,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    impl: ImplOption = "auto",
    quantization: QuantizationOption = None,
    rounds: RoundsOption = 5,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """A context from nothing to the first token behind it, on a real base. Default: 512 and 2048 tokens."""
    from whispers_engine.bench import base

    settings = base.Settings(model, device, dtype, impl, quantization, names(vs), rounds)
    lengths = integers("--context", context)
    _measure(settings, plot, json, lambda tell: base.run_prefill(settings, command_line(), lengths, progress=tell))


def throughput(options: tuple[Any, ...], experts: list[int], context: int, new_tokens: int, json: bool) -> None:
    """`bench throughput` on a real base; `options`: the first fields of `bench.base.Settings`."""
    from whispers_engine.bench import base

    settings, sizes = base.Settings(*options), (experts, [context], new_tokens)
    _measure(settings, None, json, lambda tell: base.run_throughput(settings, command_line(), *sizes, progress=tell))


def _measure(settings: Settings, plot: Path | None, json: bool, run: Callable[[Progress], Report]) -> None:
    """Runs with its progress on stderr and prints the report; status 1 where a check of ours is red."""
    from whispers_engine.bench import plot as plots

    if plot is not None:
        plots.check_plot(plot)
    with err.status("starting") as status:
        report = run(lambda what: status.update(what) if err.is_terminal else err.print(what, style="dim"))
    if json:
        print_json(report)
    else:
        _show(report)
    if not report["ok"]:
        raise typer.Exit(1)
    if plot is not None:
        plots.plot_times(report, plot)
        err.print(f"drawn into {plot}", style="dim", soft_wrap=True)


def _show(report: dict[str, Any]) -> None:
    show_machine(report)
    out.print(f"llama.cpp: {report['llama.cpp']}", soft_wrap=True)
    results = report["results"]
    peers = list(dict.fromkeys(name for result in results for name in result.get("peers", {})))
    precision = report["quantization"] or report["dtype"]
    op = results[0]["op"]
    several = op != "prefill"
    sizes = ("E", "S") if several else ("S",)
    title = f"{_TITLES[op]} of {report['model']}, {report['impl']}, {precision}"
    held = {"decode_step": ("/ one expert", "MB"), "answer": ("tokens/s",)}.get(op, ())
    columns = ("ours, ms", "floor", *held, *(f"{name}, ms (x)" for name in peers))
    table = table_of(title, *sizes, *columns)
    for result in results:
        shape = [str(result["experts"])] * several + [str(result["context"])]
        table.add_row(*shape, *_cells(result, peers))
    out.print(table)
    for result in results:
        where = f"{result['experts']} experts, {result['context']} tokens" if several else f"{result['context']} tokens"
        for group, best in result.get("against", {}).items():
            setting = result["peers"][best["peer"]].get("setting")
            rounds = result["peers"][best["peer"]]["ratio_of_rounds"]
            out.print(
                f"{where}: {best['ratio']:.2f} times as fast as {group} ({best['peer']}{', ' + setting if setting else ''}); "
                f"round by round {rounds['median']:.2f}, {rounds['low']:.2f} to {rounds['high']:.2f}",
                soft_wrap=True,
            )
    show_left_out(results, [])


def _cells(result: dict[str, Any], peers: list[str]) -> list[str]:
    if not result["ok"]:
        checked = result["check"]
        return [f"WRONG: error {checked['error']:.1e}, budget {checked['budget']:.1e}: not timed"]
    cells = [f"{result['ours_ms']:.3g}", f"{result['floor_share']:.0%}"]
    if "memory" in result:
        over = result["over_one_expert"]
        cells += ["" if over is None else f"{over:.2f}", f"{result['memory']['total'] / 1e6:.0f}"]
    if "new_tokens" in result:
        cells.append(f"{result['tokens_s']:.4g}")
    for name in peers:
        known = name in result["peers"]
        cells.append(f"{result['peers'][name]['ms']:.3g} ({ratio_cell(result, name)})" if known else "-")
    return cells
