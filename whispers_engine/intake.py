"""From a request to a task: everything that can be refused is refused here, before any work, and the spans are laid out."""

from __future__ import annotations

import itertools
import math
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from . import results
from .aggregate import POOLED, answer_pattern, check_aggregation
from .batch import Span
from .chat import ChatEncoder, Question, TextStream, check_text
from .compose import Relay, check_composable, composition
from .errors import WhispersError
from .kv_cache import page_hashes, root_hash
from .panel import Member, Panel
from .reading import Gathering, Reader, Reading
from .request import Done, Event, Failed, Request
from .router import Router, profile_text
from .sampling import SamplingParams
from .scheduler import Scheduler
from .task import Branch, Context, Route, Task

BASE = "base"  # the name of the branch that has no soft prompt
_PROFILES_KEPT = 4096  # features of profiles, the oldest make way: 9 MB at a width of 576


class Intake:
    """Makes tasks for one engine.

    Args:
        scheduler: whose limits and pool the tasks must fit.
        panel: the experts.
        chat: splits questions.
        fingerprint: of the base; part of every page's hash.

    Attributes:
        router: chooses the experts of requests that name none; None: all are asked.
    """

    def __init__(self, scheduler: Scheduler, panel: Panel, chat: ChatEncoder, fingerprint: str):
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._max_position = scheduler.model.config.max_position
        self._panel = panel
        self._chat = chat
        self._fingerprint = fingerprint
        self._ids = itertools.count()
        self._profiles: dict[tuple[str, str], Tensor] = {}  # their features, by reader and text
        self.router: Router | None = None

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
        named = self._named(request.experts)
        if named is None:
            candidates = self._candidates(score)
        else:
            candidates = [max(named, key=_weight)] if request.aggregate == "delegate" and not score else named
        profile = self._profile(request.profile, routed=named is None)
        context_ids, header = self._chat.split(request.question)
        if named is None:
            _check_readable(context_ids)
        options = self._options(request.options, required=score)
        if request.aggregate == "compose" and not score:
            check_composable(request)

        members = [(name, weight, self._panel[name] if name != BASE else None) for name, weight in candidates]
        question_tokens = len(context_ids) + len(header)
        longest = question_tokens + max(_prompt_tokens(member) for _, _, member in members)
        answer = 1 if options is None else max(map(len, options))
        if self._max_position - longest < answer:
            raise WhispersError(
                f"question: {longest} tokens with soft prompt and header, {answer} more for an answer; accepted: "
                f"{self._max_position} in all, this base's max_position_embeddings"
            )
        seats = None  # of a router that chooses who is asked: branches that will run, at most
        if named is None and not score:
            seats = 1 if request.aggregate == "delegate" else min(request.top_k, len(self._known))
        running = len(members) if seats is None else seats
        if running > self._scheduler.max_num_seqs:
            raise WhispersError(f"experts: {running} at once; accepted: max_num_seqs={self._scheduler.max_num_seqs}")

        contexts: dict[str, Context] = {}  # by the expert that the context sees, "" for none
        if named is None:
            self._context(context_ids, None, contexts)  # which the router reads
        branches = []
        for name, weight, member in members:
            context = self._context(context_ids, member, contexts)
            span = self._branch_span(context.span, header, member)
            text = TextStream(self._chat.tokenizer, request.sampling.stop)
            room = self._max_position - question_tokens - _prompt_tokens(member)
            branch = Branch(name, weight, context, span, text, _noise(name), min(request.sampling.max_tokens, room))
            if options is not None:
                branch.options = [Span("branch", span.end, ids[:-1], parent=span, scored=True) for ids in options]
                branch.option_logprobs = [0.0] * len(options)
            branches.append(branch)
        if seats is None:
            _end_as_one(branches, request.aggregate)
        pins = self._pool.lease(0)
        assert pins is not None  # of no pages
        task = Task(
            id=next(self._ids),
            contexts=list(contexts.values()) if seats is None else [contexts[""]],
            branches=branches,
            pins=pins,
            aggregate=request.aggregate,
            sampling=request.sampling,
            seed=secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed,
            options=options,
            sink=sink,
            finish=results.scored if score else lambda task: self._finish(task, request),
            routing=[] if named is None else named,
            early_end=request.early_end,
            pattern=pattern,
        )
        if self.router is not None and "" in contexts and context_ids:
            own = self._chat.own_tokens(request.question, context_ids)
            task.reading = Reading(contexts[""].span, self.router.reader, own, self._pool.page_size)
        if named is None:
            task.route = self._route(task, request, seats, profile)
        self._check_room(task)
        # Last: nothing can fail behind it and leave them held.
        fronts = [member.front for _, _, member in members if member is not None and member.front is not None]
        pins.share(page for front in fronts for page in front.pages)
        return task

    def read(self, question: Question, reader: Reader | int, sink: Callable[[Tensor], None]) -> Task:
        """A task that computes a context and hands out a reader's feature of it, float32 `[width]`; or, given a layer, the hidden states
        of the tokens that count, float32 `[tokens, hidden]`. Raises WhispersError."""
        ids, _ = self._chat.split(question)
        _check_readable(ids)
        self._check_length("question", ids)
        context = self._context(ids, None, {})
        kind = Gathering if isinstance(reader, int) else Reading
        reading = kind(context.span, reader, self._chat.own_tokens(question, ids), self._pool.page_size)  # type: ignore[arg-type]
        pins = self._pool.lease(0)
        assert pins is not None  # of no pages
        task = Task(
            id=next(self._ids),
            contexts=[context],
            branches=[],
            pins=pins,
            aggregate="vote",
            sampling=SamplingParams(),
            seed=0,
            options=None,
            sink=lambda event: None,
            finish=lambda task: [],
            routing=[],
            route=Route([reading], None, lambda task: sink(reading.feature())),
            reading=reading,
        )
        self._check_room(task)
        return task

    def _check_length(self, what: str, ids: Sequence[int]) -> None:
        if len(ids) > self._max_position:
            raise WhispersError(
                f"{what}: {len(ids)} tokens; accepted: {self._max_position}, this base's max_position_embeddings"
            )

    def _check_room(self, task: Task) -> None:
        needed, there = task.pages_needed(self._pool), self._pool.num_pages - self._pool.stats()["pages_pinned"]
        if needed > there:
            raise WhispersError(
                f"kv_cache_tokens: the page pool is too small: the request can take {needed} pages of {self._pool.page_size}, "
                f"{there} are not pinned; accepted: fewer experts, a smaller max_tokens, a shorter question, a larger pool"
            )

    # --- routing ---------------------------------------------------------------------------------------------------------------

    def _candidates(self, score: bool) -> list[tuple[str, float]]:
        """Whom a router may choose: the experts that it knows, or the base in their place. Scores are asked of all experts."""
        names = self._panel.names if score else [BASE, *self._known]
        return [(name, 1 / len(names)) for name in names]

    @property
    def _known(self) -> list[str]:
        """The experts that the router knows."""
        router = self.router
        return [] if router is None else [name for name in self._panel.names if router.knows(self._panel[name].expert)]

    def _profile(self, profile: Mapping[str, str] | None, routed: bool) -> str:
        """The profile as a text; "" for none."""
        if not profile:
            return ""
        if not routed:
            why = "no router could read it" if self.router is None else "experts are named, so none are chosen"
            raise WhispersError(f"profile: {why}; accepted: None, or experts=None and a committee with a router")
        text = profile_text(profile)
        check_text("profile", text)
        return text

    def _route(self, task: Task, request: Request, seats: int | None, profile: str) -> Route:
        """What will choose the task's branches, or only their weights (`seats=None`), once its context has been read."""
        router, query, names = self.router, task.reading, self._known
        assert router is not None and query is not None
        key = router.reader.key, profile  # this router's, even if there is another one by the time of the decision
        known, hint = self._profiles.get(key), None
        if profile and known is None:
            with_template = self._chat.tokenizer.chat_template
            ids = self._chat.split(profile)[0] if with_template else self._chat.encode(profile)
            self._check_length("profile", ids)
            own = self._chat.own_tokens(profile, ids) if with_template else [True] * len(ids)
            hint = Reading(Span("context", 0, ids), router.reader, own, self._pool.page_size)

        def decide(task: Task) -> None:
            feature = known
            if hint is not None:
                feature = self._profiles[key] = hint.feature()
                while len(self._profiles) > _PROFILES_KEPT:
                    del self._profiles[next(iter(self._profiles))]
                if task.lease is not None:
                    task.lease.drop(hint.span.pages)
            if seats is None:
                weights = dict(router.route(query.feature(), feature, names, len(names)))
                for branch in task.branches:
                    branch.weight = weights.get(branch.name, 0.0)
                return
            task.gated = not router.at_stake(query.feature())
            task.routing = [(BASE, 1.0)]
            if not task.gated:
                task.routing = router.route(query.feature(), feature, names, request.top_k)
            branches = {branch.name: branch for branch in task.branches}
            task.branches = [branches[name] for name, _ in task.routing[:seats]]
            for branch, (_, weight) in zip(task.branches, task.routing, strict=False):
                branch.weight = weight
            task.contexts = list(dict.fromkeys([*task.contexts, *(branch.context for branch in task.branches)]))
            _end_as_one(task.branches, request.aggregate)

        return Route([query] if hint is None else [query, hint], seats, decide)

    def _finish(self, task: Task, request: Request) -> list[Event]:
        """The closing events; under `compose` the base is asked for the last of them."""
        events = results.answered(task, request, self._chat.tokenizer)
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

    def _named(self, experts: Sequence[str] | Mapping[str, float] | None) -> list[tuple[str, float]] | None:
        """Names and weights that sum to one; None: the router chooses."""
        if experts is None and self.router is not None and self._panel.names:
            if not self._known:
                raise WhispersError(
                    f"experts: the committee's router knows none of {', '.join(self._panel.names)} (as they are now); accepted: "
                    "experts that are named, or a router made anew"
                )
            return None
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
            if not _is_weight(weight):
                raise WhispersError(
                    f"experts: {name!r} has the weight {weight!r}; accepted: a finite number, at least 0"
                )
        weights = {name: float(weight) for name, weight in weights.items()}
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
        tokens = [self._chat.option(option) for option in options]
        first: dict[tuple[int, ...], object] = {}  # of one that is there twice, each would have a share of its own
        for option, ids in zip(options, tokens, strict=True):
            if tuple(ids) in first:
                same = first[tuple(ids)]
                again = "" if same == option else f", by the same tokens as {same!r}"
                raise WhispersError(f"options names {option!r} twice{again}; accepted: every option once")
            first[tuple(ids)] = option
        return tokens

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


def _is_weight(value: object) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value) and value >= 0
    except OverflowError:  # an integer beyond every float
        return False


def _check_readable(context: list[int]) -> None:
    """Raises WhispersError for a context that leaves a router nothing to read."""
    if not context:
        raise WhispersError(
            "question: its only token became the header, which leaves a router nothing to read; accepted: two tokens "
            "or more, or experts that are named"
        )


def _weight(item: tuple[str, float]) -> float:
    return item[1]


def _end_as_one(branches: Sequence[Branch], aggregate: str) -> None:
    """A pool ends where its longest branch must; a branch on its own has the room that it would have alone."""
    if aggregate in POOLED:
        shortest = min(branch.max_new for branch in branches)
        for branch in branches:
            branch.max_new = shortest


def _prompt_tokens(member: Member | None) -> int:
    return 0 if member is None else member.num_tokens


def _noise(name: str) -> int:
    """A branch's part of the random numbers' counter: of its name alone, so that an expert samples the same in any committee."""
    return zlib.crc32(name.encode())
