"""`whispers train`: a committee of soft prompts from a file of records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as TaskBar
from rich.table import Table

from whispers_engine.errors import WhispersError

from .common import DEFAULT_MODEL, DeviceOption, JsonOption, err, out, print_json, pull_with_progress

if TYPE_CHECKING:
    from whispers_engine.training import Progress

# Whose names are not the settings'.
_FLAGS = {"shared_steps": "--shared", "orders": "--permute-options", "context_memory": "--cache-mb"}


def train(
    file: Annotated[Path, typer.Argument(help="Records with what people answered, one JSON object a line.")],
    target: Annotated[Path, typer.Option("--out", help="The committee's folder; must not exist.")],
    placement: Annotated[str, typer.Option("--placement", help="prefix, suffix or detached.")] = "suffix",
    kind: Annotated[
        str, typer.Option("--kind", help="embeddings, or kv: keys and values of every layer.")
    ] = "embeddings",
    virtual_tokens: Annotated[
        int | None, typer.Option("--virtual-tokens", help="Length of a soft prompt. Default: 16, or as --init has it.")
    ] = None,
    init: Annotated[
        str, typer.Option("--init", help="text, vocab, or the folder of an expert or committee to start from.")
    ] = "text",
    shared: Annotated[
        int, typer.Option("--shared", help="Steps of one prompt for all cultures first, from which each then starts.")
    ] = 0,
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts", help="Cultures of the file, or their experts' names, with commas between. Default: all."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", help="Steps of every expert, at most; 0: the --shared prompt alone.")
    ] = 200,
    batch: Annotated[int, typer.Option("--batch", help="Examples an expert and step.")] = 8,
    rate: Annotated[float, typer.Option("--rate", help="The largest learning rate, above 0.")] = 0.01,
    warmup: Annotated[float, typer.Option("--warmup", help="The share of the steps in which the rate rises.")] = 0.05,
    decay: Annotated[
        str, typer.Option("--decay", help="How it falls to zero then: linear, cosine or none.")
    ] = "linear",
    clip: Annotated[float, typer.Option("--clip", help="The largest norm of an expert's gradient, above 0.")] = 1.0,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="As AdamW's.")] = 0.0,
    dev_share: Annotated[
        float,
        typer.Option("--dev-share", help="Share of the questions held out to stop by, chosen by a hash; 0: none."),
    ] = 0.1,
    evaluate_every: Annotated[
        int | None, typer.Option("--evaluate-every", help="Steps between looks at those. Default: a tenth of all.")
    ] = None,
    patience: Annotated[
        int,
        typer.Option("--patience", help="Looks in a row, clearly worse, after which an expert stops; 0: none stops."),
    ] = 4,
    permute_options: Annotated[
        int, typer.Option("--permute-options", help="In how many orders listed options are asked.")
    ] = 1,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the examples' order, of option orders and of --init vocab.")
    ] = 0,
    licence: Annotated[str | None, typer.Option("--licence", help="The data's; goes into the experts' record.")] = None,
    cache_mb: Annotated[
        int | None, typer.Option("--cache-mb", help="Memory for contexts' keys and values; beyond it, a mapped file.")
    ] = None,
    checkpoint_seconds: Annotated[
        float, typer.Option("--checkpoint-seconds", help="How often, at most, a checkpoint is written.")
    ] = 30.0,
    model: Annotated[str, typer.Option("--model", help="Folder, hub id or built-in name of the base.")] = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Train an expert for every culture of a file, all at once; started again after a kill, it goes on to the same weights."""
    from whispers_engine.records import read_records

    if target.exists():
        raise WhispersError(f"{target}: exists; accepted: a folder that does not")
    source = read_records(file)
    with err.status(f"loading {model}"):
        from whispers_engine.training import Base, Settings
        from whispers_engine.training import train as run
    named = None if experts is None else tuple(name.strip() for name in experts.split(",") if name.strip())
    given: dict[str, Any] = {
        "placement": placement,
        "kind": kind,
        "virtual_tokens": virtual_tokens,
        "init": init,
        "experts": named,
        "steps": steps,
        "shared_steps": shared,
        "batch": batch,
        "rate": rate,
        "warmup": warmup,
        "decay": decay,
        "clip": clip,
        "weight_decay": weight_decay,
        "dev_share": dev_share,
        "evaluate_every": evaluate_every,
        "patience": patience or None,
        "orders": permute_options,
        "seed": seed,
        "checkpoint_seconds": checkpoint_seconds,
        "context_memory": None if cache_mb is None else cache_mb << 20,
        "licence": licence,
    }
    try:
        settings = Settings(**given)
    except WhispersError as error:
        typed = {**given, "patience": patience, "context_memory": cache_mb}
        raise WhispersError(_by_flag(str(error), typed)) from error
    from whispers_engine.pull import BUILT_IN

    if model in BUILT_IN:
        pull_with_progress(model)
    base = Base.load(model, device, dtype)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with TaskBar(*columns, console=err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(now: Progress) -> None:
            loss = f"loss {now.loss:.3f}" + ("" if now.dev is None else f", held out {now.dev:.3f}")
            if now.phase not in tasks:
                tasks[now.phase] = bar.add_task(now.phase, total=now.steps, completed=now.step - 1, loss=loss)
            bar.update(tasks[now.phase], completed=now.step, loss=f"{loss}, {now.active} learning")

        found = run(base, source, target, settings, show).summary
    if json:
        print_json({"file": str(file), "output": str(target), **found})
    else:
        _show(target, found)


def _by_flag(message: str, typed: Mapping[str, Any]) -> str:
    """What `Settings` refuses, in the words of the command line: `typed` has what its flags were given, by the settings' names."""
    name, _, rest = message.partition(":")
    if name not in typed:
        return f"--{message}"  # a placement that another kind has
    accepted = rest.partition("; ")[2]
    if name == "patience":
        accepted = accepted.replace("at least 1", "at least 0")  # which stands for None
    flag = _FLAGS.get(name) or "--" + name.replace("_", "-")
    number = repr(typed[name]).removesuffix(".0")  # an integer, as most type it
    return f"{flag} {number}; {accepted.removesuffix(', or None')}"


def _show(target: Path, found: dict[str, Any]) -> None:
    table = Table(title=f"{target}: {len(found['experts'])} experts, {found['placement']}", title_justify="left")
    for column in ("name", "examples", "held out", "steps", "kept", "first loss", "last loss", "held out loss"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for expert in found["experts"]:
        losses = [expert["first_loss"], expert["last_loss"], expert["dev_loss"]]
        counts = [str(expert[key]) for key in ("train", "dev", "steps", "kept_step")]
        table.add_row(expert["name"], *counts, *("" if loss is None else f"{loss:.4f}" for loss in losses))
    out.print(table)
    for expert in found["experts"]:
        if expert["broken_step"] is not None:
            out.print(
                f"{expert['name']}: stopped, its weights were not finite after step {expert['broken_step']}; "
                f"those of step {expert['kept_step']} are written",
                style="yellow",
                soft_wrap=True,
            )
    out.print(
        f"{found['examples']} examples in {found['seconds']:.0f} s, {found['contexts']} contexts computed, {found['dtype']}",
        style="dim",
        soft_wrap=True,
    )
