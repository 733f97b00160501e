"""`whispers ask`: one question, a committee, one answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from whispers_engine.errors import WhispersError

from .common import DeviceOption, DtypeOption, ImplOption, JsonOption, ModelOption, err, load_engine, out, print_json
from .watch import watch

if TYPE_CHECKING:
    from whispers_engine.engine import Engine
    from whispers_engine.request import Answer, Request


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", help="An answer to choose from; give several.")
    ] = None,
    model: ModelOption = None,
    committee: Annotated[
        Path | None, typer.Option("--committee", help="The committee's folder; none: the base alone.")
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts",
            help='Names, with commas between; "": the base alone. Default: the router chooses; without one, all.',
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", help="How many experts the router chooses.")] = 3,
    aggregate: Annotated[
        str, typer.Option("--aggregate", help="vote, delegate, mixture, product or compose.")
    ] = "vote",
    profile: Annotated[list[str] | None, typer.Option("--profile", help="KEY=VALUE, a hint to the router.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability.")] = 1.0,
    sample_top_k: Annotated[
        int, typer.Option("--sample-top-k", help="Keep so many of the likeliest tokens; 0: all.")
    ] = 0,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed, the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End an answer before this text.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="An answer's length at most.")] = 64,
    answer_pattern: Annotated[
        str | None, typer.Option("--answer-pattern", help="A regular expression with one group: what is voted on.")
    ] = None,
    early_end: Annotated[
        bool, typer.Option("--early-end/--no-early-end", help="End a vote when it is decided.")
    ] = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    impl: ImplOption = "auto",
    json: JsonOption = False,
) -> None:
    """Ask a committee of experts one question; print each expert's answer and the vote."""
    from whispers_engine.request import Request
    from whispers_engine.sampling import SamplingParams

    sampling = SamplingParams(temperature, top_p, sample_top_k, seed, stop or (), max_tokens)
    names = None if experts is None else [name.strip() for name in experts.split(",") if name.strip()]
    request = Request(question, option, names, top_k, aggregate, _pairs(profile), sampling, early_end, answer_pattern)
    engine = load_engine(model, committee, device=device, dtype=dtype, impl=impl)
    answer = _run(engine, request)
    if json:
        print_json(answer.to_dict())
    else:
        _show(question, answer, aggregate)


def _pairs(profile: list[str] | None) -> dict[str, str] | None:
    if not profile:
        return None
    pairs = [entry.partition("=") for entry in profile]
    for entry, (key, equals, _) in zip(profile, pairs, strict=True):
        if not key or not equals:
            raise WhispersError(f"--profile {entry!r}; accepted: KEY=VALUE, such as country=Japan")
    keys = [key.strip() for key, _, _ in pairs]  # as the router reads them
    for key in keys:
        if keys.count(key) > 1:
            raise WhispersError(f"--profile names {key!r} twice; accepted: every KEY once")
    return {key: value for key, _, value in pairs}


def _run(engine: Engine, request: Request) -> Answer:
    from whispers_engine.request import Done

    events = engine.stream(
        request.question,
        request.options,
        request.experts,
        request.top_k,
        request.aggregate,
        request.profile,
        request.sampling,
        request.early_end,
        request.answer_pattern,
    )
    for event in watch(events, err):
        if isinstance(event, Done):
            return event.answer
    raise AssertionError("a stream ended without an answer")


def _show(question: str, answer: Answer, aggregate: str) -> None:
    table = Table(title=question, title_justify="left", title_style="bold", show_lines=answer.options is None)
    table.add_column("expert", no_wrap=True)
    table.add_column("weight", justify="right")
    table.add_column("answer" if answer.options is None else "choice")
    table.add_column("log p", justify="right")
    table.add_column("ended", no_wrap=True)
    for record in answer.experts:
        ended = f"{record.finish_reason}, {len(record.tokens)} tokens" if answer.options is None else "option"
        table.add_row(record.expert, f"{record.weight:.2f}", record.text.strip(), f"{record.logprob:.1f}", ended)
    out.print(table)
    if len(answer.experts) > 1:
        votes = Table(title=f"{aggregate}: {answer.text.strip()}", title_justify="left", title_style="bold")
        votes.add_column("votes", justify="right")
        votes.add_column("answer")
        for text, weight in answer.votes.items():
            votes.add_row(f"{weight:.2f}", text.strip())
        out.print(votes)
    usage, timing = answer.usage, answer.timing
    saved = f", {usage['steps_saved']} saved at most by an early end" if usage["steps_saved"] else ""
    out.print(
        f"{'culture is not at stake: the base alone; ' if answer.gated else ''}"
        f"agreement {answer.agreement:.2f}, entropy {answer.diversity_entropy:.2f} bits; context {usage['context_tokens']} tokens "
        f"({usage['context_tokens_cached']} cached), branches {usage['branch_tokens']}, generated {usage['generated_tokens']}{saved}; "
        f"{timing['total']:.2f} s: {', '.join(f'{part} {timing[part]:.2f}' for part in timing if part != 'total')}",
        style="dim",
        soft_wrap=True,
    )
