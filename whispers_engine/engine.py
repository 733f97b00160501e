"""The engine: one base, its committee, and the few calls that users make."""

from __future__ import annotations

import itertools
import math
import os
import secrets
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whispers_kernels.ops import check_impl
from whispers_kernels.reference import rotate

from .aggregate import POOLED, Ballot, check_aggregation, normalise, tally
from .batch import Span, Work
from .chat import ChatEncoder, Question, TextStream, load_tokenizer
from .config import DTYPES, ModelConfig
from .errors import WhispersError
from .experts import Committee, Expert
from .kv_cache import Lease, PagePool, page_hashes, root_hash
from .model import Model
from .pull import BUILT_IN, pull
from .request import Answer, Done, Event, ExpertAnswer, Failed, Finished, Request, Scored, ScoreResult
from .sampling import SamplingParams
from .scheduler import Branch, Context, Scheduler, Task
from .weights import Checkpoint, load_weights

BASE = "base"  # the name of the branch that has no soft prompt


@dataclass(eq=False)
class _Member:
    """An expert in this engine: what of it lives on the device."""

    expert: Expert
    soft: Tensor | None = None  # [m, hidden], for rows that embed it
    front: Span | None = None  # its pinned pages, for a soft prompt in front
    lease: Lease | None = None


class Engine:
    """A frozen base and a committee of soft-prompt experts that answer together.

    Not safe for use by several threads at once.

    Args:
        model: a local Hugging Face folder, a hub id, or a built-in name (pulled on first use).
        committee: its folder; None: the base alone, until experts are added.
        device: "auto" (cuda where there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "auto" (float32 on a CPU, else as stored), "float32", "bfloat16", "float16".
        quantization: None.
        kv_cache_dtype: "auto", the model's.
        kv_cache_tokens: size of the page pool in positions; None: four of the base's longest contexts, within a quarter of the memory.
        page_size: positions a page; None: chosen for the device.
        max_num_seqs: branches that run at once.
        max_num_batched_tokens: rows a step; None: chosen for the device.
        tensor_parallel_size: 1.
        chat_template_kwargs: for the base's chat template; a thinking switch is off unless they set it.
        impl: the kernels' implementation; a named one never falls back.

    Raises:
        WhispersError: anything of these that cannot be had, and why.
    """

    def __init__(
        self,
        model: str | Path,
        committee: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        kv_cache_tokens: int | None = None,
        page_size: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        tensor_parallel_size: int = 1,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        impl: str = "auto",
    ):
        for name, value, accepted in (
            ("quantization", quantization, None),
            ("kv_cache_dtype", kv_cache_dtype, "auto"),
            ("tensor_parallel_size", tensor_parallel_size, 1),
        ):
            if value != accepted:
                raise WhispersError(f"{name}: {value!r} is not available in this version; accepted: {accepted!r}")
        if dtype != "auto" and dtype not in DTYPES:
            raise WhispersError(f"dtype: {dtype!r}; accepted: auto, {', '.join(DTYPES)}")
        try:
            check_impl(impl)
        except ValueError as error:
            raise WhispersError(str(error)) from error
        where = _device(device)
        page_size = (64 if where.type == "cuda" else 16) if page_size is None else page_size
        if max_num_batched_tokens is None:
            max_num_batched_tokens = max(max_num_seqs, 8192 if where.type == "cuda" else 512)
        for name, size, least in (
            ("page_size", page_size, 1),
            ("max_num_seqs", max_num_seqs, 1),
            ("max_num_batched_tokens", max_num_batched_tokens, 1),
            ("kv_cache_tokens", kv_cache_tokens, page_size),
        ):
            if size is not None and (not isinstance(size, int) or size < least):
                raise WhispersError(f"{name}: {size!r}; accepted: an integer, at least {least}")

        loaded = None if committee is None else Committee.load(committee)
        self.model_name = str(model)
        folder = _resolve(model)
        config = ModelConfig.load(folder)
        checkpoint = Checkpoint(folder)
        self.fingerprint = checkpoint.fingerprint(config)
        if loaded is not None and loaded.fingerprint != self.fingerprint:
            raise WhispersError(
                f"{committee}: made for the base {loaded.base_name} ({loaded.fingerprint}); {model} is {self.fingerprint}"
            )
        stored = DTYPES[config.dtype]
        torch_dtype = (torch.float32 if where.type == "cpu" else stored) if dtype == "auto" else DTYPES[dtype]
        self.tokenizer = load_tokenizer(folder)
        self.chat = ChatEncoder(self.tokenizer, config.vocab_size, chat_template_kwargs)
        self.model = Model(config, load_weights(checkpoint, config, torch_dtype, where), impl)
        pages = _pool_pages(config, torch_dtype, where, kv_cache_tokens, page_size)
        self.pool = PagePool(pages, page_size, config.num_layers, config.kv_heads, config.head_dim, torch_dtype, where)
        self._scheduler = Scheduler(self.model, self.pool, max_num_seqs, max_num_batched_tokens)
        self._members: dict[str, _Member] = {}
        self._ids = itertools.count()
        self._inbox: list[Event] = []  # events of submitted requests, until `step` hands them out
        self._submitted: dict[int, Task] = {}
        if loaded is not None:
            self._add(loaded.experts)

    # --- experts ---------------------------------------------------------------------------------------------------------------

    @property
    def experts(self) -> list[str]:
        """Names, in the order they were added."""
        return list(self._members)

    def add_expert(self, expert: Expert | str | Path) -> None:
        """Adds an expert, or the one in a folder; a soft prompt in front is computed and pinned now.

        Raises:
            WhispersError: a name that is taken, another base, another width, or a pool that has no room for its pages.
        """
        self._add([expert if isinstance(expert, Expert) else Expert.load(expert)])

    def remove_expert(self, name: str) -> None:
        """Forgets an expert. Requests that it is answering go on. Raises WhispersError for an unknown name."""
        member = self._member(name)
        del self._members[name]
        if member.lease is not None:
            member.lease.close()

    def expert(self, name: str) -> Expert:
        """The expert of that name. Raises WhispersError for an unknown one."""
        return self._member(name).expert

    def _member(self, name: str) -> _Member:
        if name not in self._members:
            raise WhispersError(
                f"expert {name!r} is not in this committee; accepted: {', '.join(self._members) or 'none'}"
            )
        return self._members[name]

    def _add(self, experts: Sequence[Expert]) -> None:
        """Adds all or none; soft prompts in front are computed together."""
        config, names = self.model.config, set(self._members)
        for expert in experts:
            expert.check_fits(config, self.fingerprint)
            if not bool(torch.isfinite(expert.embeddings.to(self.model.dtype)).all()):
                raise WhispersError(
                    f"expert {expert.name!r}: values up to {float(expert.embeddings.abs().max()):.3g} are infinite in "
                    f"{self.model.dtype}; accepted: smaller values, or an engine of another dtype"
                )
            if expert.name in names:
                raise WhispersError(
                    f"expert {expert.name!r}: the name is taken; accepted: one not in {', '.join(names)}"
                )
            names.add(expert.name)
        fronts = [expert for expert in experts if expert.placement != "suffix"]
        needed = sum(self.pool.pages_for(expert.num_tokens) for expert in fronts)
        if needed > self.pool.available:
            raise WhispersError(
                f"kv_cache_tokens: the page pool is too small to pin {len(fronts)} soft prompts: {needed} pages of "
                f"{self.pool.page_size} needed, {self.pool.available} of {self.pool.num_pages} free"
            )
        members = {expert.name: self._place(expert) for expert in experts}
        spans = [member.front for member in members.values() if member.front is not None]
        try:
            with torch.inference_mode():
                while work := self._some_rows([span for span in spans if span.pending]):
                    self._scheduler.compute(work)
        except BaseException:
            for member in members.values():
                if member.lease is not None:
                    member.lease.close()
            raise
        self._members.update(members)

    def _some_rows(self, spans: list[Span]) -> list[Work]:
        work, budget = [], self._scheduler.max_num_batched_tokens
        for span in spans:
            if budget:
                work.append(Work(span, min(span.pending, budget)))
                budget -= work[-1].count
        return work

    def _place(self, expert: Expert) -> _Member:
        """Moves an expert to the device; kv experts are written into their pages here, embeddings are computed by the caller."""
        member, m = _Member(expert), expert.num_tokens
        if expert.kind == "embeddings":
            member.soft = expert.embeddings.to(self.model.device, self.model.dtype)
        if expert.placement != "suffix":
            member.lease = self.pool.lease(self.pool.pages_for(m))
            assert member.lease is not None  # the caller has counted
            member.front = Span("pinned", -m, [-1 - j for j in range(m)], soft=member.soft, lease=member.lease)
            if expert.kind == "kv":
                self._write_kv(expert, member.front, member.lease)
        return member

    def _write_kv(self, expert: Expert, span: Span, lease: Lease) -> None:
        """Stores learned keys and values. Their context would start at m and ours starts at 0: the keys are rotated by -m, once."""
        m = expert.num_tokens
        span.pages = [lease.take("pinned") for _ in range(self.pool.pages_for(m))]
        span.computed = m
        cos, sin = self.model.rotation(torch.full((m,), -m, device=self.model.device))
        values = expert.embeddings.to(self.model.device).transpose(2, 3)  # [L, 2, m, Hkv, D], float32
        offset = torch.arange(m, device=self.model.device)
        pages = torch.tensor(span.pages, device=self.model.device)[offset // self.pool.page_size]
        for layer in range(values.shape[0]):
            self.pool.k[layer, pages, offset % self.pool.page_size] = rotate(values[layer, 0], cos, sin).to(
                self.model.dtype
            )
            self.pool.v[layer, pages, offset % self.pool.page_size] = values[layer, 1].to(self.model.dtype)

    # --- requests --------------------------------------------------------------------------------------------------------------

    def ask(
        self,
        question: Question,
        options: Sequence[str | Sequence[int]] | None = None,
        experts: Sequence[str] | Mapping[str, float] | None = None,
        top_k: int = 3,
        aggregate: str = "vote",
        profile: Mapping[str, str] | None = None,
        sampling: SamplingParams | None = None,
    ) -> Answer:
        """Asks a committee and makes one answer of many; the arguments are those of `Request`.

        Raises:
            WhispersError: anything in the request that is refused, before any work.
        """
        for event in self.stream(question, options, experts, top_k, aggregate, profile, sampling):
            if isinstance(event, Done):
                return event.answer
        raise AssertionError("a stream ended without an answer")

    def stream(
        self,
        question: Question,
        options: Sequence[str | Sequence[int]] | None = None,
        experts: Sequence[str] | Mapping[str, float] | None = None,
        top_k: int = 3,
        aggregate: str = "vote",
        profile: Mapping[str, str] | None = None,
        sampling: SamplingParams | None = None,
    ) -> Iterator[Event]:
        """As `ask`, with events as they happen; the last is `Done`. A bad request is refused at once; work starts with the first event.

        Closing the iterator early gives all pages back.
        """
        sampling = SamplingParams() if sampling is None else sampling
        events: deque[Event] = deque()
        request = Request(question, options, experts, top_k, aggregate, profile, sampling)
        return _Stream(self._scheduler, self._task(request, events.append), events)

    def score(
        self,
        context: Question,
        options: Sequence[str | Sequence[int]],
        experts: Sequence[str] | Mapping[str, float] | None = None,
    ) -> ScoreResult:
        """How likely every expert finds every option as the answer.

        Args:
            context: as a `Request`'s question.
            options: tokenised alone, without special or end tokens.
            experts: as a `Request`'s; None: all.

        Raises:
            WhispersError: anything that is refused, before any work.
        """
        events: deque[Event] = deque()
        task = self._task(Request(context, options, experts), events.append, score=True)
        for event in _Stream(self._scheduler, task, events):
            if isinstance(event, Scored):
                return event.result
        raise AssertionError("a score ended without a result")

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id; `step` brings its events.

        Raises:
            WhispersError: anything in the request that is refused, before any work.
        """
        task = self._task(request, self._inbox.append)
        self._submitted[task.id] = task
        self._scheduler.add(task)
        return task.id

    def step(self) -> list[Event]:
        """Computes one step for all requests and returns the events of the submitted ones, `Failed` among them."""
        self._scheduler.step()
        events = list(self._inbox)
        self._inbox.clear()
        for event in events:
            if isinstance(event, Done | Failed):
                self._submitted.pop(event.request_id, None)
        return events

    def abort(self, request_id: int) -> None:
        """Drops a submitted request and gives its pages back; one that is done or unknown is left alone."""
        task = self._submitted.pop(request_id, None)
        if task is not None:
            self._scheduler.abort(task)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return self._scheduler.busy

    def cache_stats(self) -> dict[str, int]:
        """pages_total, pages_free (kept ones included), pages_kept (full context pages that nobody uses at the moment), pages_pinned,
        pages_context, pages_branch."""
        return self.pool.stats()

    # --- from a request to a task ----------------------------------------------------------------------------------------------

    def _task(self, request: Request, sink: Callable[[Event], None], score: bool = False) -> Task:
        """Checks a request and lays out its spans; nothing is computed. Raises WhispersError."""
        check_aggregation(request.aggregate)
        if not isinstance(request.sampling, SamplingParams):
            raise WhispersError(f"sampling: a {type(request.sampling).__name__}; accepted: SamplingParams")
        if not isinstance(request.top_k, int) or request.top_k < 1:
            raise WhispersError(f"top_k: {request.top_k!r}; accepted: an integer, at least 1")
        if request.profile:
            raise WhispersError(
                "profile: this committee has no router that could read it; accepted: None, with experts named"
            )
        routing = self._routing(request.experts)
        context_ids, header = self.chat.split(request.question)
        options = self._options(request.options, required=score)
        asked = routing
        if request.aggregate == "delegate" and not score:
            asked = [max(routing, key=lambda item: item[1])]  # the first of the heaviest

        members = [(name, weight, self._members.get(name)) for name, weight in asked]
        question_tokens = len(context_ids) + len(header)
        longest = question_tokens + max(_prompt_tokens(member) for _, _, member in members)
        room = self.model.config.max_position - longest
        answer = 1 if options is None else max(map(len, options))
        if room < answer:
            raise WhispersError(
                f"question: {longest} tokens with soft prompt and header, {answer} more for an answer; accepted: "
                f"{self.model.config.max_position} in all, this base's max_position_embeddings"
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
            text = TextStream(self.tokenizer, request.sampling.stop)
            # A pool ends as one, where its longest branch must; a branch on its own has the room that it would have alone.
            mine = room if request.aggregate in POOLED else room + longest - question_tokens - _prompt_tokens(member)
            branch = Branch(name, weight, span, text, _noise(name), min(request.sampling.max_tokens, mine))
            if options is not None:
                branch.options = [Span("branch", span.end, ids[:-1], parent=span) for ids in options]
                branch.option_logprobs = [0.0] * len(options)
            branches.append(branch)
        fronts = [member.front for _, _, member in members if member is not None and member.front is not None]
        pins = self.pool.lease(0, [page for front in fronts for page in front.pages])
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
            finish=self._scored if score else lambda task: self._answered(task, request, routing),
        )
        needed, there = task.pages_needed(self.pool), self.pool.num_pages - self.pool.stats()["pages_pinned"]
        if needed > there:
            pins.close()
            raise WhispersError(
                f"kv_cache_tokens: the page pool is too small: the request can take {needed} pages of {self.pool.page_size}, "
                f"{there} are not pinned; accepted: fewer experts, a smaller max_tokens, a shorter question, a larger pool"
            )
        return task

    def _routing(self, experts: Sequence[str] | Mapping[str, float] | None) -> list[tuple[str, float]]:
        """Names and weights that sum to one."""
        if isinstance(experts, str):
            raise WhispersError(f"experts: the string {experts!r}; accepted: a list of names")
        named = dict.fromkeys(self._members, 1.0) if experts is None else experts
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
            self._member(name)
            if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
                raise WhispersError(
                    f"experts: {name!r} has the weight {weight!r}; accepted: a finite number, at least 0"
                )
        total = sum(weights.values())
        if not 0 < total < math.inf:
            raise WhispersError(f"experts: the weights sum to {total}; accepted: a finite sum above 0")
        return [(name, weight / total) for name, weight in weights.items()]

    def _options(self, options: Sequence[str | Sequence[int]] | None, required: bool) -> list[list[int]] | None:
        if options is None and not required:
            return None
        if isinstance(options, str) or not isinstance(options, Sequence) or not options:
            raise WhispersError(
                f"options: {options!r}; accepted: a list of strings or of lists of token ids, not empty"
            )
        return [self.chat.option(option) for option in options]

    def _context(self, ids: list[int], member: _Member | None, contexts: dict[str, Context]) -> Context:
        """The context that a branch hangs from: its own where it sees the soft prompt, one for all where it does not."""
        prefix = member is not None and member.expert.placement == "prefix"
        key = member.expert.name if member is not None and prefix else ""
        if key not in contexts:
            seen = f"prefix {member.expert.content_hash}" if member is not None and prefix else ""
            front = member.front if member is not None and prefix else None
            hashes = page_hashes(root_hash(self.fingerprint, seen), ids, self.pool.page_size)
            contexts[key] = Context(Span("context", 0, ids, front=front), hashes)
        return contexts[key]

    def _branch_span(self, context: Span, header: list[int], member: _Member | None) -> Span:
        if member is not None and member.expert.placement == "suffix":
            virtual = [-1 - j for j in range(member.expert.num_tokens)]
            return Span("branch", context.end, [*virtual, *header], parent=context, soft=member.soft)
        front = member.front if member is not None and member.expert.placement == "detached" else None
        return Span("branch", context.end, list(header), parent=context, front=front)

    # --- from a finished task to its result ------------------------------------------------------------------------------------

    def _scored(self, task: Task) -> list[Event]:
        logprobs = torch.tensor([branch.option_logprobs for branch in task.branches], dtype=torch.float64)
        weights = torch.tensor([branch.weight for branch in task.branches], dtype=torch.float64)
        result = ScoreResult(
            experts=[branch.name for branch in task.branches],
            logprobs=logprobs.float(),
            weights=weights.float(),
            pooled=(weights @ logprobs.softmax(-1)).float(),
            usage=_usage(task),
        )
        return [Scored(task.id, result)]

    def _answered(self, task: Task, request: Request, routing: list[tuple[str, float]]) -> list[Event]:
        events: list[Event] = []
        shares: list[float] | None = None
        if task.options is None or request.options is None:
            records = [branch.record() for branch in task.branches]
            choices: list[Any] = [normalise(record.text) for record in records]
            winner = choices[0] if task.pooled else None
        else:
            texts = [option if isinstance(option, str) else self.tokenizer.decode(option) for option in request.options]
            shares = _pool_options(task)
            choices = [max(range(len(texts)), key=branch.option_logprobs.__getitem__) for branch in task.branches]
            winner = max(range(len(texts)), key=shares.__getitem__) if task.pooled else None
            records = [
                ExpertAnswer(
                    branch.name, branch.weight, texts[o], branch.option_logprobs[o], list(task.options[o]), "option"
                )
                for branch, o in zip(task.branches, choices, strict=True)
            ]
            events += [Finished(task.id, record) for record in records]
        ballots = [
            Ballot(record.expert, record.weight, choice, record.logprob / len(record.tokens))
            for record, choice in zip(records, choices, strict=True)
        ]
        outcome = tally(ballots, math.fsum(record.weight for record in records), winner)
        if shares is not None and winner is not None:
            text = texts[winner]
        else:
            text = records[outcome.winner].text
        votes: dict[str, float] = {}
        for index, weight in outcome.votes:  # two options can read the same
            votes[records[index].text] = votes.get(records[index].text, 0.0) + weight
        now = time.perf_counter()
        answer = Answer(
            text=text,
            routing=routing,
            gated=False,
            experts=records,
            votes=votes,
            options=shares,
            agreement=outcome.agreement,
            diversity_entropy=outcome.diversity_entropy,
            usage=_usage(task),
            timing={
                "prefill": task.first_result - task.submitted,
                "decode": now - task.first_result,
                "total": now - task.submitted,
            },
        )
        return [*events, Done(task.id, answer)]


class _Stream(Iterator[Event]):
    """A task's events, computed as they are asked for. Unlike a generator, one dropped before its first event ends its task too."""

    def __init__(self, scheduler: Scheduler, task: Task, events: deque[Event]):
        self._scheduler = scheduler
        self._task = task
        self._events = events
        self._started = False
        self._ended = False

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        try:
            if not self._started:
                self._started = True
                self._scheduler.add(self._task)
            while not self._events:
                self._scheduler.step()
            event = self._events.popleft()
            if isinstance(event, Failed):
                raise WhispersError(event.error)
        except BaseException:
            self.close()
            raise
        if isinstance(event, Done | Scored):
            self.close()
        return event

    def close(self) -> None:
        """Ends the task and gives its pages back; a second call does nothing."""
        self._ended = True
        self._scheduler.abort(self._task)

    def __del__(self) -> None:
        self.close()


def _pool_options(task: Task) -> list[float]:
    """The options' pooled probabilities: the logarithmic pool for `product`, else the linear one."""
    logp = torch.tensor([branch.option_logprobs for branch in task.branches], dtype=torch.float64).log_softmax(-1)
    weights = torch.tensor([branch.weight for branch in task.branches], dtype=torch.float64)
    asked = weights > 0  # 0 * -inf is NaN
    logp, weights = logp[asked], weights[asked] / weights[asked].sum()
    pooled = (weights @ logp).softmax(-1) if task.aggregate == "product" else weights @ logp.exp()
    return pooled.tolist()


def _prompt_tokens(member: _Member | None) -> int:
    return 0 if member is None else member.expert.num_tokens


def _usage(task: Task) -> dict[str, int]:
    generated = sum(len(branch.tokens) for branch in task.branches)
    return {
        "context_tokens": sum(len(context.span.ids) for context in task.contexts),
        "context_tokens_cached": sum(context.cached for context in task.contexts),
        "branch_tokens": sum(len(span.ids) for branch in task.branches for span in (branch.span, *branch.options)),
        "generated_tokens": generated,
    }


def _noise(name: str) -> int:
    """A branch's part of the random numbers' counter: of its name alone, so that an expert samples the same in any committee."""
    return zlib.crc32(name.encode())


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WhispersError(f"device: {name!r}; accepted: auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise WhispersError(
            f"device: {name!r} is not available here; accepted: auto, cpu{', cuda' * torch.cuda.is_available()}"
        )
    return device


def _resolve(model: str | Path) -> Path:
    """The folder of a base: local, built in, or from the hub."""
    folder = Path(model)
    if folder.is_dir():
        return folder.resolve()
    name = str(model)
    if name in BUILT_IN:
        return pull(name)
    accepted = f"a local folder, a hub id such as org/name, or one of {', '.join(BUILT_IN)}"
    if isinstance(model, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WhispersError(f"model: {name!r} is no folder here; accepted: {accepted}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except Exception as error:  # the hub client raises a dozen types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WhispersError(f"model: {name!r} is no folder here and could not be had from the hub: {reason}") from error


def _pool_pages(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, tokens: int | None, page_size: int
) -> int:
    if tokens is None:
        per_token = 2 * config.num_layers * config.kv_heads * config.head_dim * dtype.itemsize
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[0]
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        tokens = max(page_size, min(4 * config.max_position, memory // 4 // per_token))
    return tokens // page_size
