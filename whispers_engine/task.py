"""A request on its way: its context, the branches that answer it, and how they are chosen."""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .aggregate import POOLED, voted_part
from .batch import Span
from .chat import TextStream
from .kv_cache import Lease, PagePool
from .reading import Reading
from .request import Event, ExpertAnswer
from .sampling import SamplingParams


@dataclass(eq=False)
class Context:
    """A request's context, as the base or one `prefix` expert sees it."""

    span: Span
    hashes: list[bytes]  # of its full pages
    cached: int = 0  # tokens found in the pool


@dataclass(eq=False)
class Branch:
    """One expert answering one request."""

    name: str
    weight: float
    context: Context
    span: Span  # soft prompt where the placement puts one here, header, generated tokens
    text: TextStream
    noise: int  # tells its random numbers from the other branches'
    max_new: int  # tokens it can generate
    options: list[Span] = field(
        default_factory=list
    )  # an option's tokens but the last: the rows that predict the others
    option_logprobs: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    hidden: tuple[Tensor, int] | None = None  # of a step, and the row that predicts the next token, until it is chosen
    finish_reason: str | None = None

    def record(self) -> ExpertAnswer:
        return ExpertAnswer(
            self.name, self.weight, self.text.text, self.logprob, list(self.tokens), self.finish_reason or "running"
        )


@dataclass(eq=False)
class Route:
    """A routing that is still to be made. Until then a task's branches are all that could be asked.

    Args:
        readings: of the context, and of a profile that nobody has asked with before: all must be done.
        seats: how many of the branches will be asked at most; None: all of them, and only their weights are to come.
        decide: sets the task's branches and weights.
    """

    readings: list[Reading]
    seats: int | None
    decide: Callable[[Task], None]


@dataclass
class Clock:
    """When a task reached what, in seconds of `time.perf_counter`; 0: not yet. `route` is a duration."""

    submitted: float = field(default_factory=time.perf_counter)
    context: float = 0.0  # all contexts are computed
    route: float = 0.0  # spent on deciding
    first_result: float = 0.0
    ended: float = 0.0  # all branches are done


@dataclass(eq=False)
class Task:
    """A request on its way. `finish` makes the closing events out of the finished branches."""

    id: int
    contexts: list[Context]  # the first one is the base's, where a router reads it
    branches: list[Branch]
    pins: Lease  # of the pinned soft prompts, so that they outlive their experts' removal
    aggregate: str
    sampling: SamplingParams
    seed: int
    options: list[list[int]] | None
    sink: Callable[[Event], None]
    finish: Callable[[Task], list[Event]]
    routing: list[tuple[str, float]]  # every expert asked, with its weight
    gated: bool = False
    route: Route | None = None
    reading: Reading | None = None  # of the base's context: for the route, or for the notes beside its pages alone
    early_end: bool = True
    pattern: re.Pattern[str] | None = None  # finds the part of a free answer that is voted on
    follow: Task | None = None  # what the finished task has started: the base's composition
    lease: Lease | None = None
    clock: Clock = field(default_factory=Clock)

    @property
    def pooled(self) -> bool:
        return self.aggregate in POOLED

    @property
    def undecided(self) -> bool:
        """Whether it is still open which branches are asked."""
        return self.route is not None and self.route.seats is not None

    @property
    def asked(self) -> list[tuple[str, float]]:
        """The branches' experts and weights."""
        return [(branch.name, branch.weight) for branch in self.branches]

    @property
    def readings(self) -> list[Reading]:
        route = [] if self.route is None else self.route.readings
        return route if self.reading is None or self.reading in route else [*route, self.reading]

    @property
    def seats(self) -> int:
        """Branches that run at most."""
        return len(self.branches) if self.route is None or self.route.seats is None else self.route.seats

    def part(self, branch: Branch) -> str:
        """What of a branch's free answer is voted on."""
        return voted_part(branch.text.text, self.pattern)

    @property
    def done(self) -> bool:
        if self.route is not None:
            return False
        if self.options is None:
            return all(branch.finish_reason for branch in self.branches)
        return all(not span.pending for branch in self.branches for span in (branch.span, *branch.options))

    def spans(self) -> list[Span]:
        """Those to compute, parents before children."""
        first = [] if self.route is None else [reading.span for reading in self.route.readings]
        if self.undecided:
            return first
        return [
            *dict.fromkeys([*first, *(context.span for context in self.contexts)]),
            *(branch.span for branch in self.branches),
            *(span for branch in self.branches for span in branch.options),
        ]

    def room(self, branch: Branch) -> int:
        """Positions that a branch can take at most. The last generated token is never stored."""
        return len(branch.span.ids) + (branch.max_new - 1 if self.options is None else 0)

    def pages_needed(self, pool: PagePool) -> int:
        """Pages that the task can still take at most, beyond those that its spans have."""

        def missing(span: Span, positions: int | None = None) -> int:
            return pool.pages_for(len(span.ids) if positions is None else positions) - len(span.pages)

        shared = [] if self.route is None else [reading.span for reading in self.route.readings]
        if not self.undecided:
            shared = list(dict.fromkeys([*shared, *(context.span for context in self.contexts)]))
        branches = [
            missing(branch.span, self.room(branch))
            + sum(map(missing, branch.options))
            + (missing(branch.context.span) if branch.context.span not in shared else 0)
            for branch in self.branches
        ]
        return sum(map(missing, shared)) + sum(heapq.nlargest(self.seats, branches))
