"""From a request to a task: everything that can be refused is refused here, before any work, and the spans are laid out."""

from __future__ import annotations

import itertools
import math
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence

from . import results
from .aggregate import POOLED, answer_pattern, check_aggregation
from .batch import Span
from .chat import ChatEncoder, TextStream
from .compose import Relay, check_composable, composition
from .errors import WhispersError
from .kv_cache import page_hashes, root_hash
from .panel import Member, Panel
from .request import Done, Event, Failed, Request
from .sampling import SamplingParams
from .scheduler import Branch, Context, Scheduler, Task

BASE = "base"  # the name of the branch that has no soft prompt


class Intake:
    """Makes tasks for one engine.

    Args:
        scheduler: whose limits and pool the tasks must fit.
        panel: the experts.
        chat: splits questions.
        fingerprint: of the base; part of every page's hash.
    """

    def __init__(self, scheduler: Scheduler, panel: Panel, chat: ChatEncoder, fingerprint: str):
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._max_position = scheduler.model.config.max_position
        self._panel = panel
        self._chat = chat
        self._fingerprint = fingerprint
        self._ids = itertools.count()

    def task(self, request: Request, sink: Callable[[Event], None], score: bool = False) -> Task:
        """Checks a request and lays out its spans; nothing is computed. Raises WhispersError."""
        check_aggregation(request.aggregate)
        if not isinstance(request.sampling, SamplingParams):
            raise WhispersError(f"sampling: a {type(request.sampling).__name__}; accepted: SamplingParams")
        pattern = answer_pattern(request.answer_pattern)
        if not isinstance(request.early_end, bool):
            raise WhispersError(f"early_end: {request.early_end!r}; accepted: True or False")
        if isinstance(request.top_k, bool) or not isinstance(request.top_k, int) or request.top_k < 1:
            raise WhispersError(f"top_k: {request.top_k!r}; accepted: an integer, at least 1")
        if request.profile:
            raise WhispersError(
                "profile: this committee has no router that could read it; accepted: None, with experts named"
            )
        routing = self._routing(request.experts)
        context_ids, header = self._chat.split(request.question)
        options = self._options(request.options, required=score)
        if request.aggregate == "compose" and not score:
            check_composable(request)
        asked = routing
        if request.aggregate == "delegate" and not score:
            asked = [max(routing, key=lambda item: item[1])]  # the first of the heaviest

        members = [(name, weight, self._panel[name] if name != BASE else None) for name, weight in asked]
        question_tokens = len(context_ids) + len(header)
        longest = question_tokens + max(_prompt_tokens(member) for _, _, member in members)
        room = self._max_position - longest
        answer = 1 if options is None else max(map(len, options))
        if room < answer:
            raise WhispersError(
                f"question: {longest} tokens with soft prompt and header, {answer} more for an answer; accepted: "
                f"{self._max_position} in all, this base's max_position_embeddings"
            )
        if len(members) > self._scheduler.max_num_seqs:
            raise WhispersError(
                f"experts: {len(members)} at once; accepted: max_num_seqs={self._scheduler.max_num_seqs}"
            )

        contexts: dict[str, Context] = {}  # by the expert that the context sees, "" for none
        branches = []
        for name, weight, member in members:
            context = self._context(context_ids, member, contexts)
            span = self._branch_span(context.span, header, member)
            text = TextStream(self._chat.tokenizer, request.sampling.stop)
            # A pool ends as one, where its longest branch must; a branch on its own has the room that it would have alone.
            mine = room if request.aggregate in POOLED else room + longest - question_tokens - _prompt_tokens(member)
            branch = Branch(name, weight, span, text, _noise(name), min(request.sampling.max_tokens, mine))
            if options is not None:
                branch.options = [Span("branch", span.end, ids[:-1], parent=span) for ids in options]
                branch.option_logprobs = [0.0] * len(options)
            branches.append(branch)
        fronts = [member.front for _, _, member in members if member is not None and member.front is not None]
        pins = self._pool.lease(0, [page for front in fronts for page in front.pages])
        assert pins is not None  # pinned pages are held already
        task = Task(
            id=next(self._ids),
            contexts=list(contexts.values()),
            branches=branches,
            pins=pins,
            aggregate=request.aggregate,
            sampling=request.sampling,
            seed=secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed,
            options=options,
            sink=sink,
            finish=results.scored if score else lambda task: self._finish(task, request, routing),
            early_end=request.early_end,
            pattern=pattern,
        )
        needed, there = task.pages_needed(self._pool), self._pool.num_pages - self._pool.stats()["pages_pinned"]
        if needed > there:
            pins.close()
            raise WhispersError(
                f"kv_cache_tokens: the page pool is too small: the request can take {needed} pages of {self._pool.page_size}, "
                f"{there} are not pinned; accepted: fewer experts, a smaller max_tokens, a shorter question, a larger pool"
            )
        return task

    def _finish(self, task: Task, request: Request, routing: list[tuple[str, float]]) -> list[Event]:
        """The closing events; under `compose` the base is asked for the last of them."""
        events = results.answered(task, request, routing, self._chat.tokenizer)
        last = events[-1]
        if request.aggregate != "compose" or not isinstance(last, Done):
            return events
        messages = composition(request.question, last.answer.experts)
        written = Request(messages, experts=[], aggregate="delegate", sampling=request.sampling)
        try:
            task.follow = self.task(written, Relay(task.id, last.answer, task.sink))
        except WhispersError as error:
            return [
                *events[:-1],
                Failed(task.id, f"aggregate 'compose': the experts' answers make too long a question: {error}"),
            ]
        self._scheduler.add(task.follow)
        return events[:-1]

    def _routing(self, experts: Sequence[str] | Mapping[str, float] | None) -> list[tuple[str, float]]:
        """Names and weights that sum to one."""
        if isinstance(experts, str):
            raise WhispersError(f"experts: the string {experts!r}; accepted: a list of names")
        named = dict.fromkeys(self._panel.names, 1.0) if experts is None else experts
        if not isinstance(named, Mapping | Sequence) or not all(isinstance(name, str) for name in named):
            raise WhispersError(f"experts: {experts!r}; accepted: a list of names, or a mapping from names to weights")
        if isinstance(named, Mapping):
            weights = dict(named)
        else:
            weights = dict.fromkeys(named, 1.0)
            if len(weights) != len(named):
                raise WhispersError(f"experts: {list(named)!r} names one twice; accepted: every name once")
        if not weights:
            return [(BASE, 1.0)]
        for name, weight in weights.items():
            self._panel[name]  # refuses a name that is not there
            if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
                raise WhispersError(
                    f"experts: {name!r} has the weight {weight!r}; accepted: a finite number, at least 0"
                )
        total = sum(weights.values())
        if total == 0:
            raise WhispersError("experts: all weights are 0; accepted: at least one above 0")
        if total == math.inf:
            raise WhispersError(
                f"experts: the weights {list(weights.values())} have no finite sum; accepted: smaller ones"
            )
        return [(name, weight / total) for name, weight in weights.items()]

    def _options(self, options: Sequence[str | Sequence[int]] | None, required: bool) -> list[list[int]] | None:
        if options is None and not required:
            return None
        if isinstance(options, str) or not isinstance(options, Sequence) or not options:
            raise WhispersError(
                f"options: {options!r}; accepted: a list of strings or of lists of token ids, not empty"
            )
        return [self._chat.option(option) for option in options]

    def _context(self, ids: list[int], member: Member | None, contexts: dict[str, Context]) -> Context:
        """The context that a branch hangs from: its own where it sees the soft prompt, one for all where it does not."""
        prefix = member is not None and member.expert.placement == "prefix"
        key = member.expert.name if member is not None and prefix else ""
        if key not in contexts:
            seen = f"prefix {member.expert.content_hash}" if member is not None and prefix else ""
            front = member.front if member is not None and prefix else None
            hashes = page_hashes(root_hash(self._fingerprint, seen), ids, self._pool.page_size)
            contexts[key] = Context(Span("context", 0, ids, front=front), hashes)
        return contexts[key]

    def _branch_span(self, context: Span, header: list[int], member: Member | None) -> Span:
        if member is not None and member.expert.placement == "suffix":
            virtual = [-1 - j for j in range(member.expert.num_tokens)]
            return Span("branch", context.end, [*virtual, *header], parent=context, soft=member.soft)
        front = member.front if member is not None and member.expert.placement == "detached" else None
        return Span("branch", context.end, list(header), parent=context, front=front)


def _prompt_tokens(member: Member | None) -> int:
    return 0 if member is None else member.num_tokens


def _noise(name: str) -> int:
    """A branch's part of the random numbers' counter: of its name alone, so that an expert samples the same in any committee."""
    return zlib.crc32(name.encode())
