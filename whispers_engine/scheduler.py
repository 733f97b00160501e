"""Continuous batching: which spans a step computes, and what becomes of their results."""

from __future__ import annotations

import math
import time
from collections import deque
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from whispers_kernels import pool_logits

from .aggregate import decided, normalise
from .batch import Span, Work, build_batch
from .decode import Decoder
from .kv_cache import PagePool
from .model import Model
from .request import Failed, Finished, Routed, Standing, Token
from .sampling import sample
from .task import Branch, Context, Task

_LOGIT_ROWS = 256  # rows of logits held at once: 50 MB of float32 at a vocabulary of 49152


class Computed(NamedTuple):
    """What a forward gave."""

    hidden: Tensor  # [W, hidden] the final states of the wanted rows, those of a span behind each other
    last: dict[Span, int]  # where the last one of a span is
    first_row: dict[Span, int]  # of all the step's rows


class Scheduler:
    """Runs tasks: admits them as pages and branches allow, computes a step for all, hands out tokens.

    Args:
        model, pool: what computes and where.
        max_num_seqs: branches that run at once.
        max_num_batched_tokens: rows a step.
        decoder: runs the steps that are decode alone; None: they are computed as any other.
    """

    def __init__(
        self,
        model: Model,
        pool: PagePool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        decoder: Decoder | None = None,
    ):
        self.model = model
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.decoder = decoder
        self._waiting: deque[Task] = deque()
        self._running: list[Task] = []
        self._dropped: deque[Task] = deque()  # in the middle of a step
        self._stepping = False

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, task: Task) -> None:
        self._waiting.append(task)

    def abort(self, task: Task) -> None:
        """Forgets a task, and what followed from it, and gives its pages back; one that is done already is left alone."""
        if task.follow is not None:
            self.abort(task.follow)
        if task in self._waiting:
            self._waiting.remove(task)
        if task in self._running:
            self._running.remove(task)
        if task.lease is not None:
            task.lease.close()
        task.pins.close()

    def drop(self, task: Task) -> None:
        """Aborts a task that nobody listens to any more: now, or behind the step that the garbage collector runs in."""
        self._dropped.append(task)
        if not self._stepping:
            self._abort_dropped()

    def _abort_dropped(self) -> None:
        while self._dropped:
            self.abort(self._dropped.popleft())

    def compute(self, work: list[Work], taps: dict[int, Tensor | None] | None = None) -> Computed:
        """One forward of the given rows, with pages from their spans' leases. `taps`: as `Model.forward`'s."""
        for span, count in work:
            while span.lease is not None and len(span.pages) < self.pool.pages_for(span.computed + count):
                span.pages.append(span.lease.take(span.role))
        found = None if self.decoder is None or taps else self.decoder.run(work)
        if found is None:
            config = self.model.config
            all_wanted = taps is not None and config.num_layers in taps
            batch, layout = build_batch(work, self.pool, config.vocab_size, self.model.device, all_wanted)
            computed = Computed(self.model.forward(batch, self.pool, taps), layout.last_state, layout.first_row)
        else:
            hidden, rows = found
            computed = Computed(hidden, rows, rows)
        for span, count in work:
            span.computed += count
        return computed

    @torch.no_grad()
    def step(self) -> None:
        """Computes one batch and sends the events that follow from it to the tasks' sinks.

        What is raised once the batch is computed (out of memory, Ctrl-C) ends the batch's tasks: they get `Failed`, and
        give their pages back.
        """
        # PyTorch's threads go on spinning behind each of its operations, on the cores that ours want: a step of one row took 15 ms, not 9.
        threads = torch.get_num_threads() if self.model.impl == "cpp" else None
        self._stepping = True
        try:
            if threads is not None:
                torch.set_num_threads(1)
            self._step()
        finally:
            if threads is not None:
                torch.set_num_threads(threads)
            self._abort_dropped()
            self._stepping = False

    def _step(self) -> None:
        self._admit()
        work = self._select()
        if not work:
            return
        counts = dict(work)
        readings = [reading for task in self._running for reading in task.readings if reading.span in counts]
        taps: dict[int, Tensor | None] = {reading.layer: None for reading in readings}
        computing = [task for task in self._running if any(span in counts for span in task.spans())]
        computed = self.compute(work, taps)
        try:
            for reading in readings:
                rows, row, count = taps[reading.layer], computed.first_row[reading.span], counts[reading.span]
                assert rows is not None
                reading.add(rows[row : row + count], count, self.pool)
            self._publish(counts)
            self._decide()
            self._score(computed, counts)
            self._generate(computed, counts)
            for task in [task for task in computing if task.done]:
                task.clock.ended = time.perf_counter()
                self.abort(task)  # pages first: whatever the closing events lead to, they are back
                for event in task.finish(task):
                    task.sink(event)
                computing.remove(task)
        except BaseException as error:
            for task in computing:  # what their rows said is lost, and no step computes them again: they would hang
                self.abort(task)
                task.sink(Failed(task.id, f"the step that computed the request failed: {error!r}"))
            raise

    # --- what to compute -------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Starts waiting tasks in their order, as long as they fit: all the pages that a task can ever take are reserved for it."""
        while self._waiting:
            task = self._waiting[0]
            if sum(other.seats for other in self._running) + task.seats > self.max_num_seqs:
                return
            known = {context: self._known(task, context) for context in task.contexts}
            needed = task.pages_needed(self.pool) - sum(map(len, known.values()))
            task.lease = self.pool.lease(needed, [page for pages in known.values() for page in pages])
            if task.lease is None:
                if not self._running:  # nothing will ever come free: experts were added since it was accepted
                    self.abort(task)
                    task.sink(
                        Failed(
                            task.id,
                            f"the page pool is too small by now: {needed} pages needed, {self.pool.available} free",
                        )
                    )
                    continue
                return
            self._start(task, known)
            self._running.append(self._waiting.popleft())
            if task.route is None:
                task.sink(Routed(task.id, task.asked, task.gated))

    def _known(self, task: Task, context: Context) -> list[int]:
        """Pages of a context that the pool has, its last token's never among them: one token at least is always computed."""
        full = max(0, len(context.span.ids) - 1) // self.pool.page_size
        pages = self.pool.lookup(context.hashes[:full])
        reading = task.reading
        if reading is None or reading.span is not context.span:
            return pages
        read = reading.resume(pages, self.pool)
        if task.route is None and len(read) < len(pages):  # nobody waits for what they would tell
            task.reading = None
            return pages
        return read

    def _start(self, task: Task, known: dict[Context, list[int]]) -> None:
        """Gives a task's spans their lease, and its contexts the pages that are there."""
        for span in task.spans():
            span.lease = task.lease
        if task.options is None and not task.undecided:
            for branch in task.branches:
                branch.span.room = task.room(branch)
        for context, pages in known.items():
            context.span.pages = list(pages)
            context.span.computed = context.cached = len(pages) * self.pool.page_size

    def _decide(self) -> None:
        """Routes the tasks whose contexts have been read, and starts the branches that were chosen."""
        for task in self._running:
            route = task.route
            if route is None or not all(reading.done for reading in route.readings):
                continue
            begin = time.perf_counter()
            chosen, task.route = route.seats is not None, None
            route.decide(task)
            if chosen and task.lease is not None:
                known = {context: self._known(task, context) for context in task.contexts if not context.span.pages}
                task.lease.share(page for pages in known.values() for page in pages)
                self._start(task, known)
                task.lease.shrink(task.pages_needed(self.pool))
            task.clock.route = time.perf_counter() - begin
            task.sink(Routed(task.id, task.asked, task.gated))

    def _select(self) -> list[Work]:
        """Branches that wait for one row first, so that no prefill holds them up; then what is pending, parents before children."""
        budget = self.max_num_batched_tokens
        chosen: dict[Span, int] = {}
        decode = [
            branch.span for task in self._running for branch in task.branches if branch.tokens and branch.span.pending
        ]
        rest = [span for task in self._running for span in task.spans() if span.pending]
        for span in (*decode, *rest):
            if budget == 0:
                break
            parent = span.parent
            if span in chosen or (parent is not None and parent.pending > chosen.get(parent, 0)):
                continue  # its parent is not complete, nor will be in this step
            chosen[span] = min(span.pending, budget)
            budget -= chosen[span]
        return [Work(span, count) for span, count in chosen.items()]

    # --- what becomes of it ----------------------------------------------------------------------------------------------------

    def _publish(self, counts: dict[Span, int]) -> None:
        """Makes this step's full context pages known by their hashes."""
        for task in self._running:
            if not task.clock.context and not any(context.span.pending for context in task.contexts):
                task.clock.context = time.perf_counter()
        for context in (context for task in self._running for context in task.contexts if context.span in counts):
            full = context.span.computed // self.pool.page_size
            for page, page_hash in zip(context.span.pages[:full], context.hashes[:full], strict=True):
                self.pool.publish(page, page_hash)

    def _score(self, computed: Computed, counts: dict[Span, int]) -> None:
        """Adds the log-probabilities of the option tokens that this step's rows predict."""
        hidden, last, _ = computed
        uses: list[tuple[int, int, Branch, int]] = []  # hidden state, the token it predicts, whose, of which option
        for task in self._running:
            if task.options is None:
                continue
            before = len(uses)
            for branch in task.branches:
                if branch.span in counts and not branch.span.pending:
                    uses += [(last[branch.span], ids[0], branch, option) for option, ids in enumerate(task.options)]
                for option, span in enumerate(branch.options):
                    if span in counts:
                        first = 1 - counts[span]
                        targets = task.options[option][span.computed + first : span.computed + 1]
                        uses += [(last[span] + first + at, target, branch, option) for at, target in enumerate(targets)]
            if len(uses) > before and not task.clock.first_result:
                task.clock.first_result = time.perf_counter()
        rows = sorted({row for row, *_ in uses})
        for begin in range(0, len(rows), _LOGIT_ROWS):
            block = {row: index for index, row in enumerate(rows[begin : begin + _LOGIT_ROWS])}
            chosen = self.model.on_device(list(block), torch.int64)
            logits = self.model.logits(hidden[chosen]).float()  # [rows of the block, V]
            mine = [use for use in uses if use[0] in block]
            index = self.model.on_device([(block[row], target) for row, target, *_ in mine], torch.int64)
            logp = logits[index[:, 0], index[:, 1]] - logits.logsumexp(-1)[index[:, 0]]
            for (_, _, branch, option), value in zip(mine, logp.tolist(), strict=True):
                branch.option_logprobs[option] += value

    def _generate(self, computed: Computed, counts: dict[Span, int]) -> None:
        """Chooses the next token of every branch, or pool of branches, that has all its hidden states."""
        groups: list[tuple[Task, list[Branch]]] = []
        for task in self._running:
            if task.options is not None:
                continue
            live = [branch for branch in task.branches if branch.finish_reason is None]
            for branch in live:
                if branch.span in counts and not branch.span.pending:
                    branch.hidden = computed.hidden, computed.last[branch.span]
            ready = [branch for branch in live if branch.hidden is not None]
            if not task.pooled:
                groups += [(task, [branch]) for branch in ready]
            elif len(ready) == len(live):
                groups.append((task, live))
        if not groups:
            return
        groups.sort(key=lambda group: _rule(group[0]))  # stable
        tokens, pooled, own = self._choose(groups)
        row = 0
        for (task, members), token, logprob in zip(groups, tokens, pooled, strict=True):
            self._append(task, members, token, logprob, own[row : row + len(members)])
            row += len(members)
        ended = {task: None for task, members in groups if any(branch.finish_reason for branch in members)}
        for task in ended:  # after all of the step's ballots: their order is nobody's
            if task.aggregate == "vote":
                self._count(task)

    def _choose(self, groups: list[tuple[Task, list[Branch]]]) -> tuple[list[int], list[float], list[float]]:
        """Returns every group's token, its log-probability in the pool, and in each member's own distribution; groups in order of rules.

        Whether a branch is `greedy` is up to its own task: it gets the same token and bits in any company.
        """
        hidden = _gather([branch.hidden for _, group in groups for branch in group if branch.hidden is not None])
        alone = sum(_rule(task) == "greedy" for task, _ in groups)  # a group of one each
        parts = []
        if alone:
            tokens, logp = self.model.likeliest(hidden[:alone])
            parts.append((tokens, logp, logp))
        if alone < len(groups):
            parts.append(self._pool(groups[alone:], hidden[alone:]))
        tokens, pooled, own = (part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True))
        if hidden.device.type == "cpu":
            found = pooled.tolist()
            return tokens.tolist(), found, found if own is pooled else own.tolist()
        # The one time that a step waits for the device. Token ids and float32 are exact in float64.
        found, count = torch.cat([tokens.double(), pooled.double(), own.double()]).tolist(), len(groups)
        return [int(token) for token in found[:count]], found[count : 2 * count], found[2 * count :]

    def _pool(self, groups: list[tuple[Task, list[Branch]]], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for mixtures and products, on the device. A branch on its own is a pool of one: its own distribution."""
        on_device = self.model.on_device
        logits = self.model.logits(hidden)
        weights = [branch.weight if task.pooled else 1.0 for task, group in groups for branch in group]
        ends = [0, *accumulate(len(group) for _, group in groups)]
        split = sum(_rule(task) == "mixture" for task, _ in groups)
        parts = []
        for rule, first, last in (("mixture", 0, split), ("product", split, len(groups))):
            if first < last:
                begin, end = ends[first], ends[last]
                group_ptr = on_device([at - begin for at in ends[first : last + 1]], torch.int32)
                share = on_device(weights[begin:end], torch.float32)
                parts.append(pool_logits(logits[begin:end], share, group_ptr, rule, impl=self.model.impl))
        logp = torch.cat(parts)  # [groups, V]
        tokens = sample(
            logp,
            [task.sampling for task, _ in groups],
            [task.seed for task, _ in groups],
            [0 if task.pooled else group[0].noise for task, group in groups],
            [len(group[0].tokens) for _, group in groups],
        )
        pooled = own = logp.gather(1, tokens[:, None])[:, 0]
        if len(hidden) > len(groups):  # else every branch is its own pool
            of_row = tokens[on_device([at for at, (_, group) in enumerate(groups) for _ in group], torch.int64)]
            own = logits.gather(1, of_row[:, None])[:, 0].float() - logits.float().logsumexp(-1)
            # Of a pool of one, the pool's: the last bits differ, and a branch's result is its own in any company.
            single = on_device([at for at, (_, group) in enumerate(groups) if len(group) == 1], torch.int64)
            own[on_device(ends[:-1], torch.int64)[single]] = pooled[single]
        return tokens, pooled, own

    def _append(self, task: Task, members: list[Branch], token: int, logprob: float, own: list[float]) -> None:
        """Gives a group its next token, and ends it where that was the last one."""
        task.clock.first_result = task.clock.first_result or time.perf_counter()
        ended = token in self.model.config.eos_ids
        piece, reason = "", None
        for branch, branch_logprob in zip(members, own, strict=True):
            branch.hidden = None
            branch.tokens.append(token)
            branch.logprob += branch_logprob
            piece = "" if ended else branch.text.push(token)
            reason = (
                "stop" if ended or branch.text.stopped else "length" if len(branch.tokens) == branch.max_new else None
            )
            if reason is None:
                branch.span.ids.append(token)
            else:
                piece += branch.text.finish()
                reason = "stop" if branch.text.stopped else reason  # what was held back may be a stop string
                self._end(task, branch, reason)
        task.sink(Token(task.id, None if task.pooled else members[0].name, token, piece, logprob))
        if reason is not None:
            for branch in members:
                task.sink(Finished(task.id, branch.record()))

    def _end(self, task: Task, branch: Branch, reason: str) -> None:
        branch.finish_reason = reason
        if task.lease is not None:
            task.lease.drop(branch.span.pages)  # early, for others to use
        branch.span.pages = []

    def _count(self, task: Task) -> None:
        """Tells how the vote stands, and cuts all branches that run once they can no longer change who wins. The task is done then."""
        running = [branch for branch in task.branches if branch.finish_reason is None]
        votes: dict[str, float] = {}
        given: dict[str, str] = {}  # a choice as it was first given
        for branch in task.branches:
            if branch.finish_reason is not None:
                part = task.part(branch)
                choice = normalise(part)
                votes[choice] = votes.get(choice, 0.0) + branch.weight
                given.setdefault(choice, part.strip())
        left = math.fsum(branch.weight for branch in running)
        over = not running or decided(votes, left)
        ranked = sorted(votes, key=votes.__getitem__, reverse=True)
        task.sink(Standing(task.id, [(given[choice], votes[choice]) for choice in ranked], left, over))
        if over and task.early_end:
            for branch in running:
                branch.text.finish()
                self._end(task, branch, "vote")
                task.sink(Finished(task.id, branch.record()))


def _rule(task: Task) -> Literal["greedy", "mixture", "product"]:
    """How a task's next tokens are chosen; a step takes the rules in the order of the alphabet."""
    if not task.pooled and task.sampling.temperature == 0:
        return "greedy"
    return "product" if task.aggregate == "product" else "mixture"


def _gather(rows: list[tuple[Tensor, int]]) -> Tensor:
    """Rows of steps' hidden states, `[R, hidden]`; without a copy where they are one step's first ones, as mostly while all decode."""
    states = rows[0][0]
    if all(mine is states and row == at for at, (mine, row) in enumerate(rows)):
        return states if len(rows) == len(states) else states[: len(rows)]
    return torch.stack([mine[row] for mine, row in rows])
