"""From a finished task to its answer or its scores."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from .aggregate import Ballot, normalise, tally
from .request import Answer, Done, Event, ExpertAnswer, Finished, Request, Scored, ScoreResult
from .task import Task


def scored(task: Task) -> list[Event]:
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


def answered(task: Task, request: Request, tokenizer: Any) -> list[Event]:
    events: list[Event] = []
    shares: list[float] | None = None
    if task.options is None or request.options is None:
        records = [branch.record() for branch in task.branches]
        parts = [task.part(branch).strip() for branch in task.branches] if task.pattern else [r.text for r in records]
        choices: list[Any] = [normalise(part) for part in parts]
        winner = choices[0] if task.pooled else None
    else:
        texts = [option if isinstance(option, str) else tokenizer.decode(option) for option in request.options]
        shares = _pool_options(task)
        choices = [max(range(len(texts)), key=branch.option_logprobs.__getitem__) for branch in task.branches]
        winner = max(range(len(texts)), key=shares.__getitem__) if task.pooled else None
        records = [
            ExpertAnswer(
                branch.name, branch.weight, texts[o], branch.option_logprobs[o], list(task.options[o]), "option"
            )
            for branch, o in zip(task.branches, choices, strict=True)
        ]
        parts = [record.text for record in records]
        events += [Finished(task.id, record) for record in records]
    voters = [at for at, record in enumerate(records) if record.finish_reason != "vote"]
    ballots = [
        Ballot(records[at].expert, records[at].weight, choices[at], records[at].logprob / len(records[at].tokens))
        for at in voters
    ]
    outcome = tally(ballots, math.fsum(record.weight for record in records), winner)
    if shares is not None and winner is not None:
        text = texts[winner]
    else:
        text = records[voters[outcome.winner]].text
    votes: dict[str, float] = {}
    for index, weight in outcome.votes:  # two options can read the same
        given = parts[voters[index]]
        votes[given] = votes.get(given, 0.0) + weight
    answer = Answer(
        text=text,
        routing=task.routing,
        gated=task.gated,
        experts=records,
        votes=votes,
        options=shares,
        agreement=outcome.agreement,
        diversity_entropy=outcome.diversity_entropy,
        usage=_usage(task),
        timing=_timing(task),
    )
    return [*events, Done(task.id, answer)]


def _pool_options(task: Task) -> list[float]:
    """The options' pooled probabilities: the logarithmic pool for `product`, else the linear one."""
    logp = torch.tensor([branch.option_logprobs for branch in task.branches], dtype=torch.float64).log_softmax(-1)
    weights = torch.tensor([branch.weight for branch in task.branches], dtype=torch.float64)
    asked = weights > 0  # 0 * -inf is NaN
    logp, weights = logp[asked], weights[asked] / weights[asked].sum()
    pooled = (weights @ logp).softmax(-1) if task.aggregate == "product" else weights @ logp.exp()
    return pooled.tolist()


def _usage(task: Task) -> dict[str, int]:
    cut = [branch for branch in task.branches if branch.finish_reason == "vote"]
    return {
        "context_tokens": sum(len(context.span.ids) for context in task.contexts),
        "context_tokens_cached": sum(context.cached for context in task.contexts),
        "branch_tokens": sum(len(span.ids) for branch in task.branches for span in (branch.span, *branch.options)),
        "generated_tokens": sum(len(branch.tokens) for branch in task.branches),
        "steps_saved": sum(branch.max_new - len(branch.tokens) for branch in cut),
    }


def _timing(task: Task) -> dict[str, float]:
    clock, now = task.clock, time.perf_counter()
    return {
        "prefill": clock.context - clock.submitted,
        "route": clock.route,
        "branch_start": clock.first_result - clock.context - clock.route,
        "decode": clock.ended - clock.first_result,
        "aggregate": now - clock.ended,
        "total": now - clock.submitted,
    }
