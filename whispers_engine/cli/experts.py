"""`whispers experts`: list, show, create, import and export the experts of a committee."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from whispers_engine.errors import WhispersError

from .common import CommitteeOption, JsonOption, ModelOption, load_engine, out, print_json

app = typer.Typer(no_args_is_help=True, help="The experts of a committee.")

NameArgument = Annotated[str, typer.Argument(help="The expert's name.")]
CultureOption = Annotated[str | None, typer.Option("--culture", help="Whom it speaks for, as the data names them.")]


def _describe(expert: Any) -> dict[str, Any]:
    return {
        "name": expert.name,
        "culture": expert.culture,
        "placement": expert.placement,
        "kind": expert.kind,
        "virtual_tokens": expert.num_tokens,
        "base": expert.base,
        "record": expert.record,
    }


def _find(committee: Path, name: str) -> Any:
    from whispers_engine.experts import Committee

    experts = {expert.name: expert for expert in Committee.load(committee).experts}
    if name not in experts:
        raise WhispersError(f"expert {name!r} is not in {committee}; accepted: {', '.join(experts) or 'none'}")
    return experts[name]


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
def show(name: NameArgument, committee: CommitteeOption, json: JsonOption = False) -> None:
    """Show one expert: what it is, what it was made from, the size of its values."""
    expert = _find(committee, name)
    norms = expert.embeddings.norm(dim=-1)
    size = {"smallest": float(norms.min()), "mean": float(norms.mean()), "largest": float(norms.max())}
    if json:
        print_json({**_describe(expert), "shape": list(expert.embeddings.shape), "norms": size})
        return
    table = Table(title=name, title_justify="left", show_header=False)
    record = ", ".join(f"{key}: {value}" for key, value in expert.record.items())
    for key, value in {**_describe(expert), "record": record, "shape": list(expert.embeddings.shape)}.items():
        table.add_row(key, "" if value is None else str(value))
    table.add_row("norms", ", ".join(f"{key} {value:.3f}" for key, value in size.items()))
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
    """Make an expert from a sentence."""
    from whispers_engine.experts import Committee, Expert

    engine = load_engine(*_base(model, committee))
    expert = Expert.from_text(name, text, engine, placement, culture, virtual_tokens)
    Committee.add(committee, expert, engine.model_name, engine.fingerprint)
    out.print(f"{committee / name}: {expert.num_tokens} virtual tokens, {placement}")


@app.command("import")
def import_peft(
    folder: Annotated[Path, typer.Argument(help="A PEFT adapter: prompt tuning or prefix tuning.")],
    name: Annotated[str, typer.Option("--name", help="What the expert will be called.")],
    committee: CommitteeOption,
    placement: Annotated[str, typer.Option("--placement", help="prefix is what PEFT computes.")] = "prefix",
    culture: CultureOption = None,
    model: ModelOption = None,
) -> None:
    """Import a PEFT adapter."""
    from dataclasses import replace

    from whispers_engine.experts import Committee, Expert

    expert = Expert.from_peft(folder, name, placement, culture)
    engine = load_engine(*_base(model, committee))
    expert.check_fits(engine.model.config, engine.fingerprint)
    expert = replace(expert, base=engine.fingerprint, record={"imported": "peft"})
    Committee.add(committee, expert, engine.model_name, engine.fingerprint)
    out.print(f"{committee / name}: {expert.num_tokens} virtual tokens, {expert.kind}, {placement}")


@app.command()
def export(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(help="Where to write the adapter; must not exist.")],
    committee: CommitteeOption,
) -> None:
    """Export an expert as a PEFT adapter."""
    expert = _find(committee, name)
    if folder.exists():
        raise WhispersError(f"{folder}: exists; accepted: a folder that does not")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expert.to_peft(folder)
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)
    out.print(f"{folder}: {expert.num_tokens} virtual tokens, {expert.kind}")


def _base(model: str | None, committee: Path) -> tuple[str | None, None]:
    """The base to load: the named one, or an existing committee's; its experts are not needed."""
    from whispers_engine.experts import Committee

    exists = (committee / "committee.json").is_file()
    return (model or (Committee.load(committee).base_name if exists else None)), None
