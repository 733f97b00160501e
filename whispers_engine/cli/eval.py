"""`whispers eval`: how near a committee's answers are to people's, beside simpler ways of answering; a run that was interrupted goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from whispers_engine.errors import WhispersError

from .common import DeviceOption, DtypeOption, ImplOption, JsonOption, ModelOption, err, load_engine, out, print_json

if TYPE_CHECKING:
    from whispers_engine.evaluation.run import Evaluation

REPORT, PAGE, STORE = "report.json", "report.html", "computed.jsonl"


def evaluate(
    file: Annotated[Path, typer.Argument(help="Records with options, one JSON object a line.")],
    committee: Annotated[
        list[Path] | None,
        typer.Option("--committee", help="A committee's folder; give several to compare them. None: the base alone."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="The folder for the report and what was computed. Default: FILE with .eval."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option("--train", help="Records that the table of option texts is made of.")
    ] = None,
    blind: Annotated[
        Path | None, typer.Option("--blind", help="A committee of one expert, trained on all cultures.")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", help="Questions for the router: question, culture (null: neutral), names."),
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option("--neutral", help="Questions in which culture is not at stake, for the gate.")
    ] = None,
    cultures: Annotated[
        str | None, typer.Option("--cultures", help="Names, with commas between. Default: all with an expert.")
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", help="A key of the records, such as topic: figures for each of its texts too.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", help="DATA=EXPERT: a culture's name in the data, and its expert's.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", help="How many experts the router chooses.")] = 3,
    profile: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Route also with the culture given in a profile.")
    ] = True,
    resamples: Annotated[int, typer.Option("--resamples", help="Of the bootstrap.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    impl: ImplOption = "auto",
    json: JsonOption = False,
) -> None:
    """Measure a committee against what people answered; started again, it computes only what it has not computed yet."""
    from whispers_engine.evaluation.cast import read_cast
    from whispers_engine.evaluation.compute import Computer
    from whispers_engine.evaluation.data import make_dataset, read_asked
    from whispers_engine.evaluation.plots import check_plots
    from whispers_engine.evaluation.report import html
    from whispers_engine.evaluation.run import Evaluation, Settings
    from whispers_engine.evaluation.store import Store
    from whispers_engine.files import new_file, write_json
    from whispers_engine.records import read_records

    for name, value, least in (("--top-k", top_k, 1), ("--resamples", resamples, 100), ("--seed", seed, 0)):
        if value < least:
            raise WhispersError(f"{name} {value}; accepted: an integer, at least {least}")
    check_plots()
    folder = file.with_name(file.name.removesuffix(".jsonl") + ".eval") if report is None else report
    if not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise WhispersError(f"--report {folder}: accepted: a folder, or a name for one in a folder that exists")
    aliases = _pairs(alias)
    source = read_records(file)
    asked = [] if questions is None else read_asked(questions, aliases, neutral=False)
    asked += [] if neutral is None else read_asked(neutral, aliases, neutral=True)
    cast = read_cast(committee or [], blind)
    dataset = make_dataset(source, _chosen(cultures, cast.cultures), aliases, by)
    learned = None if train is None else make_dataset(read_records(train), None, aliases)

    engine = load_engine(model or cast.base_name, None, device=device, dtype=dtype, impl=impl)
    names = cast.engage(engine)
    dtype_name = str(engine.model.dtype).removeprefix("torch.")
    store = Store(folder / STORE, engine.fingerprint, engine.chat.content_hash, dtype_name)
    evaluation = Evaluation(
        Computer(engine, names, store), cast, dataset, learned, asked, Settings(top_k, profile, resamples, seed)
    )
    evaluation.check()
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    with store:
        try:
            _run(evaluation)
        except BaseException:
            err.print(f"{folder / STORE}: holds what was computed; the same command goes on", soft_wrap=True)
            raise
        with err.status("intervals and plots"):
            found = evaluation.report()
            page = html(found)
    write_json(folder / REPORT, found)
    with new_file(folder / PAGE) as half_written:
        half_written.write_text(page, encoding="utf-8")
    if json:
        print_json({**found, "report": str(folder), "seconds": time.perf_counter() - started})
    else:
        _show(found, folder, by)


def _pairs(alias: list[str] | None) -> dict[str, str]:
    found = {}
    for entry in alias or []:
        data, equals, expert = entry.partition("=")
        if not data.strip() or not equals or not expert.strip():
            raise WhispersError(f"--alias {entry!r}; accepted: DATA=EXPERT, such as 'US=United States'")
        found[data.strip()] = expert.strip()
    return found


def _chosen(text: str | None, there: list[str] | None) -> list[str] | None:
    """The cultures asked for; all that are there where none are."""
    if text is None:
        return there
    chosen = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in chosen if there is not None and name not in there]
    if unknown or not chosen:
        raise WhispersError(
            f"--cultures {text!r}: {', '.join(unknown) or 'none'}; accepted: names with commas between"
            + ("" if there is None else f", of {', '.join(there)}")
        )
    return chosen


def _run(evaluation: Evaluation) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=evaluation.units)
        evaluation.compute(lambda what, units: bar.update(task, description=what, advance=units))


def _show(found: Mapping[str, Any], folder: Path, by: str | None) -> None:
    from whispers_engine.evaluation.view import full_label, gap_to, number, reference_row, with_interval

    for one in found["committees"]:
        if one["trained_on_this_file"]:
            err.print(
                f"{one['label']}: trained on this very file: {', '.join(one['trained_on_this_file'])}", style="red"
            )
    for metric, section in found["metrics"].items():
        reference = reference_row(section)
        name = next(full_label(row) for row in section["rows"] if row["row"] == reference)
        title = f"{metric}, {section['pairs']} answers of cultures to {section['questions']} questions"
        table = Table(
            title=title, title_justify="left", title_style="bold", caption=f"difference: {name}, less the row"
        )
        table.add_column("row")
        for column in ("n", "mean of cultures", "skill", "difference"):
            table.add_column(column, justify="right", no_wrap=True)
        committee = None
        for row in section["rows"]:
            if row["committee"] != committee:
                committee = row["committee"]
                table.add_section()
                table.add_row(committee, style="bold")
            gap = gap_to(section, reference, row["row"])
            skill = number(row["skill"]["mean"], signed=True)
            mean = with_interval(row["macro"])
            table.add_row(row["label"], str(row["pooled"]["n"]), mean, skill, with_interval(gap, signed=True))
        out.print(table)
        if by is not None:
            _show_parts(by, section)
    for committee, routing in found["routing"].items():
        _show_routing(committee, routing)
    times = ", ".join(f"{one['who']} {one['median_ms']:.0f} ms" for one in found["latency"])
    out.print(f"a question alone: {times}", style="dim", soft_wrap=True)
    if found["left_out"]:
        out.print(f"cultures left out, without an expert: {', '.join(found['left_out'])}", style="dim", soft_wrap=True)
    out.print(f"{folder / PAGE}, {folder / REPORT}", style="dim", soft_wrap=True)


def _show_parts(by: str, section: Mapping[str, Any]) -> None:
    from whispers_engine.evaluation.view import full_label, with_interval

    names = [name for name, one in section["rows"][0]["parts"].items() if one["n"]]
    table = Table(title=f"by {by}, pooled", title_justify="left", title_style="bold")
    table.add_column("row")
    for name in names:
        table.add_column(f"{name}, n = {section['rows'][0]['parts'][name]['n']}", justify="right")
    for row in section["rows"]:
        table.add_row(full_label(row), *(with_interval(row["parts"][name]) for name in names))
    out.print(table)


def _show_routing(committee: str, routing: Mapping[str, Any]) -> None:
    from whispers_engine.evaluation.view import number, with_interval

    table = Table(title=f"routing, {committee}", title_justify="left", title_style="bold")
    table.add_column("questions")
    for column in ("n", "first", "among three", "ECE"):
        table.add_column(column, justify="right", no_wrap=True)
    kinds = {**{f"names {what}": one for what, one in (routing["named"] or {}).items()}, "profile": routing["profile"]}
    for what, one in kinds.items():
        if one is not None:
            cells = (with_interval(one["top1"]), with_interval(one["top3"]), number(one["ece"]))
            table.add_row(what, str(one["top1"]["n"]), *cells)
    if table.row_count:
        out.print(table)
    for side in ("file", "questions"):
        if routing["gate"] and side in routing["gate"]:
            out.print(f"gate, {side} against neutral: AUROC {with_interval(routing['gate'][side]['auroc'])}")
