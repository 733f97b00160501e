"""What a person sees while a committee answers: the branches growing side by side, and how the vote stands. On stderr.

A terminal gets a view that is drawn over and over and is gone when the answer is there; anything else gets plain lines as things happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from whispers_engine.request import Event

_A_SECOND = 12  # frames: more than a person follows, and 1 % of a core
_POOL = "together"  # whose text a pool's or the base's own composition is


class Progress:
    """What is known so far of one request."""

    def __init__(self) -> None:
        self.routing: dict[str, float] = {}
        self.texts: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        self.votes: list[tuple[str, float]] = []
        self.running = 1.0

    def take(self, event: Event) -> None:
        from whispers_engine.request import Finished, Routed, Standing, Token

        if isinstance(event, Routed):
            self.routing = dict(event.routing)
        elif isinstance(event, Token):
            name = _POOL if event.expert is None else event.expert
            self.texts[name] = self.texts.get(name, "") + event.text
            self.tokens[name] = self.tokens.get(name, 0) + 1
        elif isinstance(event, Finished):
            self.ended[event.answer.expert] = event.answer.finish_reason
            self.texts[event.answer.expert] = event.answer.text
        elif isinstance(event, Standing):
            self.votes, self.running = event.votes, event.running

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.routing:
            yield Text("reading the question", style="dim")
            return
        names = [_POOL] if _POOL in self.texts and not self.ended else [*self.routing]
        names += [_POOL] if _POOL in self.texts and self.ended else []
        fit = max(1, options.max_width // 24)  # narrower columns than this read badly
        room = max(3, (options.height or 24) // -(-len(names) // fit) - 5)
        for first in range(0, len(names), fit):
            shown = names[first : first + fit]
            table = Table(expand=True)
            for name in shown:
                weight = f" {self.routing[name]:.2f}" if name in self.routing else ""
                table.add_column(f"{name}{weight}", ratio=1, no_wrap=False)
            width = max(8, options.max_width // len(shown) - 3)
            table.add_row(*(self._cell(name, width, room) for name in shown))
            yield table
        for answer, votes in self.votes[:5]:
            yield Text(f"{votes:.2f} {answer}", no_wrap=True, overflow="ellipsis")
        if self.votes:
            yield Text(f"{self.running:.2f} still running", style="dim")

    def _cell(self, name: str, width: int, room: int) -> Text:
        """The end of a branch's text, and what became of it."""
        text = self.texts.get(name, "").strip()
        ended = self.ended.get(name)
        state = ended if ended else f"{self.tokens.get(name, 0)} tokens"
        lines = Text(text).wrap(Console(width=width), width)[-room:]
        return Text.assemble(Text("\n").join(lines), "\n", (state, "dim"))


def watch(events: Iterable[Event], console: Console) -> Iterator[Event]:
    """Passes a request's events on and shows them on the way."""
    return _live(events, console) if console.is_terminal else _plain(events, console)


def _live(events: Iterable[Event], console: Console) -> Iterator[Event]:
    progress = Progress()
    with Live(progress, console=console, transient=True, refresh_per_second=_A_SECOND):
        for event in events:
            progress.take(event)
            yield event


def _plain(events: Iterable[Event], console: Console) -> Iterator[Event]:
    from whispers_engine.request import Finished, Routed, Standing

    for event in events:
        line = None
        if isinstance(event, Routed):
            asked = ", ".join(f"{name} {weight:.2f}" for name, weight in event.routing)
            line = f"asked: {asked}" + (" (culture is not at stake)" if event.gated else "")
        elif isinstance(event, Finished):
            line = f"{event.answer.expert} ({event.answer.finish_reason}): {_one_line(event.answer.text)}"
        elif isinstance(event, Standing):
            votes = ", ".join(f"{weight:.2f} {_one_line(text)}" for text, weight in event.votes)
            line = f"votes: {votes}; {event.running:.2f} still running{', decided' if event.decided else ''}"
        if line is not None:
            console.print(line, soft_wrap=True)
        yield event


def _one_line(text: str) -> str:
    """What a base says may hold control characters; a log's reader, and a terminal that shows the log, are spared them."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
