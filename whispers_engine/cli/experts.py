"""`whispers experts`: list, show, create, import and export the experts of a committee, and make its router."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress as TaskBar
from rich.table import Table

from whispers_engine.errors import WhispersError

from .common import CommitteeOption, JsonOption, ModelOption, err, load_engine, out, print_json, pull_with_progress

if TYPE_CHECKING:
    from torch import Tensor

    from whispers_engine.engine import Engine
    from whispers_engine.experts import Committee, Expert

app = typer.Typer(no_args_is_help=True, help="The experts of a committee.")

NameArgument = Annotated[str, typer.Argument(help="The expert's name.")]
CultureOption = Annotated[str | None, typer.Option("--culture", help="Whom it speaks for, as the data names them.")]


def _describe(expert: Expert) -> dict[str, Any]:
    return {
        "name": expert.name,
        "culture": expert.culture,
        "placement": expert.placement,
        "kind": expert.kind,
        "virtual_tokens": expert.num_tokens,
        "base": expert.base,
        "record": expert.record,
    }


def _find(folder: Path, committee: Committee, names: Sequence[str]) -> list[Expert]:
    """The experts of these names, each once; of no names, all."""
    experts = {expert.name: expert for expert in committee.experts}
    for name in names:
        if name not in experts:
            raise WhispersError(f"expert {name!r} is not in {folder}; accepted: {', '.join(experts) or 'none'}")
    return [experts[name] for name in dict.fromkeys(names or experts)]


@app.command("list")
def list_experts(committee: CommitteeOption, json: JsonOption = False) -> None:
    """List a committee's experts."""
    from whispers_engine.experts import Committee

    found = Committee.load(committee)
    if json:
        base = {"name": found.base_name, "fingerprint": found.fingerprint}
        print_json({"base": base, "experts": [_describe(expert) for expert in found.experts]})
        return
    table = Table(title=f"{committee}: {len(found.experts)} experts for {found.base_name}", title_justify="left")
    for column in ("name", "culture", "placement", "kind", "virtual tokens"):
        table.add_column(column, justify="right" if column == "virtual tokens" else "left")
    for expert in found.experts:
        table.add_row(expert.name, expert.culture or "", expert.placement, expert.kind, str(expert.num_tokens))
    out.print(table)


@app.command()
def show(
    committee: CommitteeOption,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="The experts' names. Default: all.")
    ] = None,
    model: ModelOption = None,
    json: JsonOption = False,
) -> None:
    """Show experts: what they are, their norms, the base's tokens nearest to each virtual token; of several, how alike they are.

    With --json, a single NAME prints that expert's object, anything else one object of the committee.
    """
    from whispers_engine.experts import Committee

    found = Committee.load(committee)
    experts = _find(committee, found, names or [])
    report = _report(experts, *_tokens(committee, found, model))
    if json and len(names or []) == 1:
        print_json({**report["experts"][0], "base_norm": report["base"]["norm"]})
    elif json:
        print_json(report)
    else:
        _show(report)


def _report(experts: list[Expert], base: dict[str, str], table: Tensor, tokenizer: Any) -> dict[str, Any]:
    """Everything that `show` prints; the rest as `_tokens` gives it."""
    import torch

    from whispers_engine.similarity import expert_similarity, nearest_tokens

    soft = [expert for expert in experts if expert.kind == "embeddings"]  # keys and values are like no token
    rows = [expert.embeddings for expert in soft]  # of [m, hidden]
    none = torch.empty(0, table.shape[1])  # kv experts alone: only the base's norm is wanted
    found = nearest_tokens(torch.cat([none, *rows]), table)
    sizes = [len(row) for row in rows]
    nearest = {
        expert.name: [
            [
                {"token": _readable(tokenizer, token), "id": token, "cosine": cosine}
                for token, cosine in zip(*pair, strict=True)
            ]
            for pair in zip(ids.tolist(), cosines.tolist(), strict=True)
        ]
        for expert, ids, cosines in zip(soft, found.ids.split(sizes), found.cosine.split(sizes), strict=True)
    }
    described = [
        {
            **_describe(expert),
            "shape": list(expert.embeddings.shape),
            "norms": _norms(expert.embeddings),
            "token_norms": expert.embeddings.norm(dim=-1).tolist() if expert in soft else None,
            "nearest": nearest.get(expert.name),
        }
        for expert in experts
    ]
    matrix = expert_similarity(soft).tolist() if soft else []
    return {
        "base": {**base, "norm": found.base_norm},
        "experts": described,
        "similarity": {"names": [expert.name for expert in soft], "matrix": matrix},
    }


def _tokens(folder: Path, committee: Committee, model: str | None) -> tuple[dict[str, str], Tensor, Any]:
    """Of the committee's base, or another copy of it: name and fingerprint, token embeddings [V, hidden], tokenizer; no other weights."""
    from whispers_engine.chat import load_tokenizer
    from whispers_engine.config import ModelConfig
    from whispers_engine.engine import base_folder
    from whispers_engine.pull import BUILT_IN
    from whispers_engine.weights import Checkpoint

    name = model or committee.base_name
    if name in BUILT_IN:
        pull_with_progress(name)
    base = base_folder(name)
    config, checkpoint = ModelConfig.load(base), Checkpoint(base)
    fingerprint = checkpoint.fingerprint(config)
    if fingerprint != committee.fingerprint:
        raise WhispersError(
            f"{folder}: made for the base {committee.base_name} ({committee.fingerprint}); {name} is {fingerprint}"
        )
    for expert in committee.experts:
        expert.check_fits(config, fingerprint)
    table = checkpoint.tensor(checkpoint.embeddings_name(config), config.vocab_size, config.hidden_size)
    return {"name": name, "fingerprint": fingerprint}, table, load_tokenizer(base)


def _readable(tokenizer: Any, token: int) -> str:
    """A token as text; one that is part of a character only, or no text at all, as the vocabulary has it."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))


def _norms(vectors: Tensor) -> dict[str, float]:
    """Of vectors [..., width]."""
    norms = vectors.norm(dim=-1)
    return {"smallest": float(norms.min()), "mean": float(norms.mean()), "largest": float(norms.max())}


def _show(report: dict[str, Any]) -> None:
    described = report["experts"]
    for expert in described:
        table = Table(title=expert["name"], title_justify="left", title_style="bold", show_header=False)
        rows = {key: value for key, value in expert.items() if key not in ("token_norms", "nearest")}
        # Curves are for --json: hundreds of numbers.
        rows["record"] = ", ".join(f"{key}: {value}" for key, value in expert["record"].items() if "curve" not in key)
        rows["norms"] = ", ".join(f"{key} {value:.3f}" for key, value in expert["norms"].items())
        if expert["kind"] == "embeddings":
            rows["norms"] += f"; the base's tokens {report['base']['norm']:.3f}"
        for key, value in rows.items():
            table.add_row(key, "" if value is None else str(value))
        out.print(table)
        if expert["nearest"] is not None:
            _show_nearest(expert)
    if len(report["similarity"]["names"]) > 1:
        _show_similarity(**report["similarity"])


def _show_nearest(expert: dict[str, Any]) -> None:
    table = Table()
    for column in ("#", "norm"):
        table.add_column(column, justify="right")
    for rank in ("nearest", "second", "third")[: len(expert["nearest"][0])]:
        table.add_column(f"{rank} token")
    for index, (norm, tokens) in enumerate(zip(expert["token_norms"], expert["nearest"], strict=True), 1):
        # repr: white space is most of some tokens
        cells = [f"{token['cosine']:.2f} {token['token']!r}" for token in tokens]
        table.add_row(str(index), f"{norm:.3f}", *cells)
    out.print(table)


def _show_similarity(names: list[str], matrix: list[list[float]]) -> None:
    """As many columns at once as the terminal has room for: a number cut short is another number."""
    labels = [f"{index} {name}" for index, name in enumerate(names, 1)]
    fit = max(1, (out.width - max(map(len, labels)) - 4) // len(" -0.00 │"))
    out.print("cosine of the experts' mean virtual tokens", style="bold")
    for first in range(0, len(names), fit):
        table = Table()
        table.add_column("", no_wrap=True)
        columns = range(first, min(first + fit, len(names)))
        for column in columns:
            table.add_column(str(column + 1), justify="right", no_wrap=True)
        for label, row in zip(labels, matrix, strict=True):
            table.add_row(label, *(f"{row[column]:.2f}" for column in columns))
        out.print(table)


@app.command()
def create(
    name: NameArgument,
    text: Annotated[str, typer.Option("--text", help="The sentence whose token embeddings become the soft prompt.")],
    committee: CommitteeOption,
    placement: Annotated[str, typer.Option("--placement", help="prefix, suffix or detached.")] = "suffix",
    culture: CultureOption = None,
    virtual_tokens: Annotated[
        int | None, typer.Option("--virtual-tokens", help="Cut or repeat the text's tokens to so many.")
    ] = None,
    model: ModelOption = None,
) -> None:
    """Make an expert from a sentence; it replaces one of that name."""
    from whispers_engine.experts import Expert

    engine = load_engine(*_base(model, committee))
    expert = Expert.from_text(name, text, engine, placement, culture, virtual_tokens)
    _add(committee, expert, engine, f"{expert.num_tokens} virtual tokens, {placement}")


@app.command()
def router(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help='Examples, one JSON object a line: {"question": ..., "culture": ...}, null (or "neutral": true) for none.',
        ),
    ],
    committee: CommitteeOption,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            "--records", help="Records that experts were trained with: questions that name no culture, for the gate."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate", help="Questions such as people ask: weights become as sure as they are right on them."
        ),
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="token, linear, or centroid (the paper's rule).")] = "token",
    layer: Annotated[
        int | None, typer.Option("--layer", help="Which hidden states it reads. Default: the shipped base's best.")
    ] = None,
    model: ModelOption = None,
    json: JsonOption = False,
) -> None:
    """Train the committee's router and gate on examples; they replace the ones that are there."""
    from whispers_engine.records import read_records
    from whispers_engine.router import FILE
    from whispers_engine.router_examples import read_examples, record_examples
    from whispers_engine.router_fit import fit_router

    examples = [example for file in files for example in read_examples(file)]
    examples += [example for file in records or [] for example in record_examples(read_records(file))]
    calibration = [] if calibrate is None else read_examples(calibrate)
    engine = load_engine(model, committee)
    with TaskBar(console=err, transient=True) as bar:
        task = bar.add_task("reading the examples", total=len(examples))

        def show(done: int, total: int) -> None:
            bar.update(
                task,
                description="reading the examples" if done <= len(examples) else "learning",
                completed=done,
                total=total,
            )

        fitted = fit_router(engine, examples, kind, layer, show, calibration)
    fitted.router.save(committee)
    unknown = [name for name in engine.experts if not fitted.router.knows(engine.expert(name))]
    found = {
        "kind": kind,
        "layer": fitted.router.layer,
        "experts": [name for name, _ in fitted.router.experts],
        "unknown": unknown,
        "gate": fitted.router.gate is not None,
        "temperature": fitted.router.temperature,
        "examples": fitted.examples,
        "held_out_top1": fitted.top1,
        "held_out_top3": fitted.top3,
        "held_out_gate_auroc": fitted.gate_auroc,
    }
    if json:
        print_json(found)
        return
    out.print(
        f"{committee / FILE}: {kind}, layer {fitted.router.layer}, {len(fitted.router.experts)} experts"
        f"{', a gate' if fitted.router.gate is not None else ''}, from {fitted.examples} examples",
        soft_wrap=True,
    )
    if unknown:
        out.print(f"unknown to it, for want of examples: {', '.join(unknown)}", soft_wrap=True)
    out.print(
        f"held out, names that the rest does not have: the right expert first {fitted.top1:.2f}, among three {fitted.top3:.2f}"
        f"{'' if fitted.gate_auroc is None else f'; gate AUROC {fitted.gate_auroc:.3f}'}",
        style="dim",
        soft_wrap=True,
    )


@app.command("import")
def import_peft(
    folder: Annotated[Path, typer.Argument(help="A PEFT adapter: prompt tuning or prefix tuning.")],
    name: Annotated[str, typer.Option("--name", help="What the expert will be called.")],
    committee: CommitteeOption,
    placement: Annotated[
        str, typer.Option("--placement", help="prefix (what PEFT computes), suffix or detached.")
    ] = "prefix",
    culture: CultureOption = None,
    model: ModelOption = None,
) -> None:
    """Import a PEFT adapter; it replaces an expert of that name."""
    from dataclasses import replace

    from whispers_engine.experts import Expert

    expert = Expert.from_peft(folder, name, placement, culture)
    engine = load_engine(*_base(model, committee))
    expert.check_fits(engine.model.config, engine.fingerprint)
    expert = replace(expert, base=engine.fingerprint, record={"imported": "peft"})
    _add(committee, expert, engine, f"{expert.num_tokens} virtual tokens, {expert.kind}, {placement}")


@app.command()
def export(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(help="Where to write the adapter; must not exist.")],
    committee: CommitteeOption,
) -> None:
    """Export an expert as a PEFT adapter."""
    from whispers_engine.experts import Committee

    (expert,) = _find(committee, Committee.load(committee), [name])
    if folder.exists():
        raise WhispersError(f"{folder}: exists; accepted: a folder that does not")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expert.to_peft(folder)
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)
    out.print(f"{folder}: {expert.num_tokens} virtual tokens, {expert.kind}", soft_wrap=True)


def _add(folder: Path, expert: Expert, engine: Engine, what: str) -> None:
    from whispers_engine.experts import Committee

    replaced = (folder / expert.name / "expert.json").is_file()
    Committee.add(folder, expert, engine.model_name, engine.fingerprint)
    out.print(
        f"{folder / expert.name}: {what}{'; replaced the one of that name' if replaced else ''}",
        soft_wrap=True,
    )


def _base(model: str | None, committee: Path) -> tuple[str | None, None]:
    """The base to load: the named one, or an existing committee's; its experts are not needed."""
    from whispers_engine.experts import Committee

    exists = (committee / "committee.json").is_file()
    return (model or (Committee.load(committee).base_name if exists else None)), None
