"""`whispers score`: every option of every record of a file, scored by every expert; a run that was interrupted goes on."""

from __future__ import annotations

import json as json_module
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from whispers_engine.errors import WhispersError

from .common import DeviceOption, DtypeOption, ImplOption, JsonOption, ModelOption, err, load_engine, out, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from whispers_engine.engine import Engine
    from whispers_engine.records import Record, RecordFile

FORMAT = 1  # of the output; changes with what a line holds and with how a record becomes a prompt


def score(
    file: Annotated[Path, typer.Argument(help="Records, one JSON object a line.")],
    committee: Annotated[
        Path | None, typer.Option("--committee", help="The committee's folder; none: the base alone.")
    ] = None,
    model: ModelOption = None,
    experts: Annotated[
        str | None, typer.Option("--experts", help='Names, with commas between; "": the base alone. Default: all.')
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where the lines go. Default: FILE with .scores.jsonl.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    impl: ImplOption = "auto",
    json: JsonOption = False,
) -> None:
    """Score the options of a file's records by every expert, a line of JSON a record; started again, it goes on where it ended."""
    from whispers_engine.records import read_records

    source = read_records(file)
    for record in source.records:
        if not record.options:
            raise WhispersError(f"{source.where(record)}: has no options to score; accepted: records with options")
    target = file.with_name(file.name.removesuffix(".jsonl") + ".scores.jsonl") if output is None else output
    if not target.parent.is_dir():
        raise WhispersError(f"{target}: {target.parent} is no folder; accepted: a file in one that exists")
    if target.exists() and not target.is_file():  # a device may have no end to read to
        there_is = "a folder" if target.is_dir() else "no regular file"
        raise WhispersError(
            f"{target}: is {there_is}; accepted: a new file, or one that `whispers score` wrote, to go on with"
        )
    engine = load_engine(model, committee, device=device, dtype=dtype, impl=impl)
    names = None if experts is None else [name.strip() for name in experts.split(",") if name.strip()]
    asked = engine.experts if names is None else names
    lines = Lines(target, _header(engine, names, source))
    summary = Summary()
    there = lines.read(len(source.records), summary)
    todo = source.records[there:]
    _check(engine, asked, source, todo)
    started = time.perf_counter()
    try:
        _run(engine, names, source, todo, lines, summary)
    finally:
        if there < summary.records < len(source.records):
            err.print(
                f"{target}: holds {summary.records} of {len(source.records)} records; the same command goes on",
                soft_wrap=True,
            )
    found = {"file": str(file), "output": str(target), "there_already": there, **summary.to_dict()}
    if json:
        print_json({**found, "seconds": time.perf_counter() - started})
    else:
        _show(found)


def _header(engine: Engine, names: Sequence[str] | None, source: RecordFile) -> dict[str, Any]:
    """What the numbers depend on: lines that were made otherwise are not continued."""
    from whispers_engine.intake import BASE

    members = [engine.expert(name) for name in (engine.experts if names is None else names)]
    return {
        "whispers": "score",
        "version": FORMAT,
        "base": engine.fingerprint,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "experts": [
            {"name": expert.name, "placement": expert.placement, "content": expert.content_hash} for expert in members
        ]
        or [{"name": BASE}],
        "weights": "equal" if names is not None or engine.router is None else engine.router.content_hash,
        "prompting": engine.chat.content_hash,
        "file": source.sha256,
    }


def _check(engine: Engine, asked: Sequence[str], source: RecordFile, records: Sequence[Record]) -> None:
    """Refuses what this engine cannot score (too long a question, say) before anything is computed."""
    from whispers_engine.records import prompt

    for record in records:
        question, options = prompt(record)
        try:
            engine.stream(question, options, asked)  # refused now; the work would start with its first event
        except WhispersError as error:
            raise WhispersError(f"{source.where(record)}: {error}") from error


def _run(
    engine: Engine,
    names: Sequence[str] | None,
    source: RecordFile,
    records: Sequence[Record],
    lines: Lines,
    summary: Summary,
) -> None:
    columns = (MofNCompleteColumn(), BarColumn(), _Speed(), TimeRemainingColumn())
    with lines, Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=summary.records + len(records), completed=summary.records)
        for record in records:
            line = _line(engine, names, source, record, index=summary.records)
            lines.append(line)
            summary.add(line)
            bar.advance(task)


def _line(
    engine: Engine, names: Sequence[str] | None, source: RecordFile, record: Record, index: int
) -> dict[str, Any]:
    from whispers_engine.records import prompt

    question, options = prompt(record)
    result = engine.score(question, options, names)
    for name, row in zip(result.experts, result.logprobs.tolist(), strict=True):
        if not all(map(math.isfinite, row)):
            raise WhispersError(
                f"{source.where(record)}: {name} gives the log-probabilities {row}; accepted: finite ones (--dtype float32 has the "
                "widest range)"
            )
    return {
        "index": index,
        **({} if record.id is None else {"id": record.id}),
        "question": record.question,
        "options": list(record.options),
        "experts": result.experts,
        "logprobs": _numbers(result.logprobs),  # [experts][options]
        "probabilities": _numbers(result.logprobs.double().softmax(-1).float()),  # [experts][options]
        "weights": _numbers(result.weights),  # [experts]
        "pooled": _numbers(result.pooled),  # [options]
    }


def _numbers(tensor: Tensor) -> Any:
    """A float32 tensor as nested lists, every number as short as reads back to the same float32."""
    if tensor.dim() > 1:
        return [_numbers(row) for row in tensor]
    return [float(str(value)) for value in tensor.numpy()]


class Lines:
    """The output: a header that says what made it, then a line a record.

    Lines are appended whole, so that an interrupted run leaves complete ones. A torn last line, of a machine that went down, is cut off.

    Args:
        path: the file; where it exists, it must have the same header.
        header: what every line of the file depends on.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self._path = path
        self._header = header
        self._keep = 0  # bytes that stay
        self._file: BinaryIO | None = None

    def read(self, most: int, summary: Summary) -> int:
        """Adds the lines that are there to the summary and returns their number. Nothing is changed yet.

        Raises:
            WhispersError: a file that other settings made, or that `whispers score` did not make.
        """
        data = self._path.read_bytes() if self._path.exists() else b""
        if _encode(self._header).startswith(data):  # new, or torn within the header
            return 0
        self._keep = data.rfind(b"\n") + 1
        first, *rest = data[: self._keep].splitlines() or [data]
        self._check_header(first)
        for index, line in enumerate(rest[: most + 1]):
            self._add(line, index, most, summary)
        return len(rest)

    def _add(self, line: bytes, index: int, most: int, summary: Summary) -> None:
        try:
            value = json_module.loads(line)
            if value["index"] != index or index >= most:
                raise ValueError(index)
            summary.add(value)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise WhispersError(
                f"{self._path}:{index + 2}: is not the line of record {index}; accepted: the lines that `whispers score` wrote, or "
                "another --output"
            ) from error

    def _check_header(self, line: bytes) -> None:
        try:
            found = json_module.loads(line)
            ours = found["whispers"] == self._header["whispers"]
        except (ValueError, TypeError, KeyError):
            ours = False
        if not ours:
            raise WhispersError(
                f"{self._path}: exists, and is no output of `whispers score`; accepted: one to go on with, or another --output"
            )
        differing = [key for key, value in self._header.items() if found.get(key) != value]
        if differing:
            details = "; ".join(_difference(key, found.get(key), self._header[key]) for key in differing)
            raise WhispersError(
                f"{self._path}: was begun otherwise: {details}; accepted: the same again, or another --output"
            )

    def __enter__(self) -> Lines:
        self._file = self._path.open("ab")
        self._file.truncate(self._keep)
        if self._keep == 0:
            self.append(self._header)
        return self

    def append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(_encode(line))
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _encode(line: Mapping[str, Any]) -> bytes:
    return (json_module.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _difference(key: str, found: Any, now: Any) -> str:
    """What differs, in words that a user can act on."""
    if key == "file":
        return "its records were others (the file has changed since)"
    if key == "prompting":
        return "its base had another tokenizer or chat template"
    if key == "weights":
        return "its experts' weights came from elsewhere (another router, or --experts)"
    if key == "experts" and isinstance(found, list) and all(isinstance(expert, dict) for expert in found):
        before, after = ([expert.get("name") for expert in experts] for experts in (found, now))
        if before != after:
            return f"experts {', '.join(map(str, before))}, now {', '.join(after)}"
        changed = [new["name"] for old, new in zip(found, now, strict=True) if old != new]
        return f"the experts {', '.join(changed)} had other values or another placement"
    return f"{key} {found}, now {now}"


class Summary:
    """Means over the lines of an output."""

    def __init__(self) -> None:
        self.records = 0
        self._options = 0
        self._sums: dict[str, float] = {"agreement": 0.0, "diversity_entropy": 0.0, "entropy": 0.0}
        self._experts: dict[str, dict[str, float]] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Raises KeyError, TypeError, ValueError or IndexError for what is no line."""
        from whispers_engine.aggregate import Ballot, tally

        pooled = line["pooled"]
        first = max(range(len(pooled)), key=pooled.__getitem__)
        ballots = []
        for name, weight, logprobs, probabilities in zip(
            line["experts"], line["weights"], line["logprobs"], line["probabilities"], strict=True
        ):
            choice = max(range(len(pooled)), key=logprobs.__getitem__)
            ballots.append(Ballot(name, weight, choice, logprobs[choice]))
            mine = self._experts.setdefault(name, {"entropy": 0.0, "with_pool": 0.0})
            mine["entropy"] += _entropy(probabilities)
            mine["with_pool"] += choice == first
        outcome = tally(ballots, math.fsum(line["weights"]))
        self._sums["agreement"] += outcome.agreement
        self._sums["diversity_entropy"] += outcome.diversity_entropy
        self._sums["entropy"] += _entropy(pooled)
        self._options += len(pooled)
        self.records += 1

    def to_dict(self) -> dict[str, Any]:
        """Means over the records, entropies in bits: `entropy` of the option probabilities, `diversity_entropy` and `agreement` of the
        experts' choices as an Answer's, `with_pool` how often an expert's first option was the pool's."""

        def mean(sums: Mapping[str, float]) -> dict[str, float]:
            return {key: value / self.records for key, value in sums.items()}

        return {
            "records": self.records,
            "options": self._options,
            **mean(self._sums),
            "experts": [{"name": name, **mean(sums)} for name, sums in self._experts.items()],
        }


def _entropy(probabilities: Sequence[float]) -> float:
    return -math.fsum(p * math.log2(p) for p in probabilities if p > 0) + 0.0


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2f} records/s")


def _show(found: Mapping[str, Any]) -> None:
    table = Table(title=f"{found['records']} records, {found['options']} options", title_justify="left")
    table.add_column("expert", no_wrap=True)
    for column in ("entropy", "first option as pooled"):
        table.add_column(column, justify="right")
    for expert in found["experts"]:
        table.add_row(expert["name"], f"{expert['entropy']:.2f} bits", f"{expert['with_pool']:.2f}")
    if len(found["experts"]) > 1:
        table.add_section()
        table.add_row("pooled", f"{found['entropy']:.2f} bits", "")
    out.print(table)
    out.print(
        f"agreement {found['agreement']:.2f}, entropy of the votes {found['diversity_entropy']:.2f} bits, means over the records",
        style="dim",
        soft_wrap=True,
    )
    there = f" ({found['there_already']} of them there already)" if found["there_already"] else ""
    out.print(f"{found['output']}: {found['records']} records{there}", style="dim", soft_wrap=True)
