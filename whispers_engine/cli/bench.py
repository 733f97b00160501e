"""`whispers bench`: measurements beside what a user would otherwise run. Nothing that a check finds wrong is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import bench_base, bench_train
from .bench_common import (
    DtypeOption,
    PeersOption,
    command_line,
    device_named,
    dtype_named,
    integers,
    names,
    ratio_cell,
    show_left_out,
    show_machine,
    table_of,
)
from .common import DEFAULT_MODEL, DeviceOption, ImplOption, JsonOption, err, out, print_json

app = typer.Typer(no_args_is_help=True, help="Measure, always beside what a user would otherwise run.")
app.command()(bench_base.decode)
app.command()(bench_base.prefill)
app.command()(bench_train.train)


@app.command()
def kernels(
    device: DeviceOption = "auto",
    impl: ImplOption = "auto",
    experts: Annotated[
        str | None, typer.Option(help="Experts, one row each. Default: 1,4,8,16,32,64; fewer on a CPU.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Shared keys. Default: 128,512,2048,8192,32768; fewer on a CPU.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="llama-1b, llama-8b, llama-70b, or QxKVxDIM. Default: all three.")
    ] = None,
    dtype: DtypeOption = "auto",
    peers: PeersOption = None,
    ops: Annotated[bool, typer.Option(help="The small operations too.")] = True,
    seconds: Annotated[float | None, typer.Option(help="Begin nothing new after so many.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios to the best peer, PNG or SVG.")] = None,
    json: JsonOption = False,
) -> None:
    """Decode attention of E experts over one shared context, and the small operations."""
    from whispers_engine.bench import kernels as bench
    from whispers_engine.bench import plot as plots

    if plot is not None:
        plots.check_plot(plot)
    where = device_named(device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None)
        report = bench.run_kernels(
            where,
            dtype_named(dtype, where),
            command_line(),
            impl=impl,
            experts=integers("--experts", experts),
            contexts=integers("--context", context),
            heads=names(heads),
            peers=names(peers),
            ops=ops,
            seconds=seconds,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if json:
        print_json(report)
    else:
        _show_kernels(report)
    if plot is not None:
        plots.plot_ratios(report, plot)
        err.print(f"drawn into {plot}", style="dim", soft_wrap=True)
    if not report["ok"]:
        raise typer.Exit(1)


@app.command()
def throughput(
    peers: PeersOption = None,
    experts: Annotated[str, typer.Option(help="Committees' sizes.")] = "1,8",
    context: Annotated[int, typer.Option(help="Tokens of the shared context.")] = 2048,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens each expert generates.")] = 64,
    model: bench_base.ModelOption = DEFAULT_MODEL,
    quantization: bench_base.QuantizationOption = None,
    rounds: bench_base.RoundsOption = 3,
    shape: Annotated[
        str | None,
        typer.Option(help="Steps of a random Llama instead of a real base: llama-1b, llama-8b or tiny."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    impl: ImplOption = "auto",
    json: JsonOption = False,
) -> None:
    """Whole answers of a committee from nothing, on a real base; or, with --shape, steps of a random Llama of any size."""
    sizes = integers("--experts", experts) or []
    if shape is None:
        options = (model, device, dtype, impl, quantization, names(peers), rounds)
        return bench_base.throughput(options, sizes, context, new_tokens, json)
    from whispers_engine.bench.throughput import run_throughput

    where = device_named(device)
    with err.status("throughput") as status:
        report = run_throughput(
            where,
            dtype_named(dtype, where),
            command_line(),
            shape=shape,
            experts=sizes,
            context=context,
            new_tokens=new_tokens,
            impl=impl,
            peers=names(peers),
            progress=lambda what: status.update(what),
        )
    if json:
        print_json(report)
    else:
        _show_throughput(report)
    if not report["ok"]:
        raise typer.Exit(1)


# --- tables for people -------------------------------------------------------------------------------------------------------------


def _show_kernels(report: dict[str, Any]) -> None:
    results = report["results"]
    show_machine(report)
    attention = [result for result in results if result["op"] == "committee_attention"]
    others = [result for result in results if result["op"] != "committee_attention"]
    peers = list(dict.fromkeys(name for result in attention for name in result.get("peers", {})))
    table = table_of(
        f"decode attention, {report['impl']}", "heads", "E", "S", *_RATES, *(f"x {name}" for name in peers)
    )
    for result in attention:
        table.add_row(result["heads"], str(result["experts"]), str(result["context"]), *_cells(result, peers))
    out.print(table)
    crossovers = table_of("no slower than every peer from S on", "heads", "E", "S")
    for crossover in report["crossover"]:
        begin = crossover["context"]
        crossovers.add_row(
            crossover["heads"], str(crossover["experts"]), "never in this sweep" if begin is None else str(begin)
        )
    out.print(crossovers)
    if others:
        peers = list(dict.fromkeys(name for result in others for name in result.get("peers", {})))
        table = table_of("small operations", "operation", "rows and width", *_RATES, *(f"x {name}" for name in peers))
        for result in others:
            table.add_row(result["op"], result["shape"], *_cells(result, peers))
        out.print(table)
    show_left_out(results, report["left_out"])


def _show_throughput(report: dict[str, Any]) -> None:
    show_machine(report)
    checked = report["check"]
    if not checked["ok"]:
        out.print(
            f"WRONG: two layers differ from transformers by {checked['error']:.1e}, budget {checked['budget']:.1e}: nothing is timed"
        )
        return
    peers = list(dict.fromkeys(name for result in report["results"] for name in result["peers"]))
    columns = ("shape", "E", "S", "ms a step", "tokens/s", "GB/s", "floor", "/ one expert")
    table = table_of(f"decode steps, {report['impl']}", *columns, *(f"x {name}" for name in peers))
    for result in report["results"]:
        over = result["over_one_expert"]
        table.add_row(
            result["shape"],
            str(result["experts"]),
            str(result["context"]),
            f"{result['ours_ms']:.3g}",
            f"{result['tokens_s']:.4g}",
            f"{result['GB_s']:.4g}",
            f"{result['floor_share']:.0%}",
            "" if over is None else f"{over:.2f}",
            *(ratio_cell(result, name) for name in peers),
        )
    out.print(table)
    show_left_out(report["results"], [])


_RATES = ("us", "GB/s", "TFLOP/s", "floor")


def _cells(result: dict[str, Any], peers: list[str]) -> list[str]:
    if not result["ok"]:
        if "failure" in result:
            return [f"FAILED: {result['failure']}"]
        error = "NaN" if result["error"] is None else f"{result['error']:.1e}"
        return [f"WRONG: error {error}, budget {result['budget']:.1e}"]
    numbers = [f"{result['ours_ms'] * 1e3:.4g}", f"{result['GB_s']:.4g}", f"{result['TFLOP_s']:.3g}"]
    return [*numbers, f"{result['floor_share']:.0%}", *(ratio_cell(result, name) for name in peers)]
