"""What goes into the engine and what comes out: requests, answers, scores and the events of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from .chat import Question
from .sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """A question to a committee.

    Args:
        question: a string (one user turn), chat messages, token ids, or (context ids, header ids).
        options: strings or lists of token ids; with them nothing is generated, each expert chooses.
        experts: names, with equal weights, or a mapping from names to weights; `[]`: the base alone; None: the router chooses, and a
            committee without a router is asked whole, with equal weights.
        top_k: how many experts the router chooses at most.
        aggregate: "vote", "delegate", "mixture", "product" or "compose".
        profile: a hint to the router, such as `{"country": "Japan"}`; it never enters the prompt. Only where the router chooses.
        sampling: how answers are generated.
        early_end: whether a vote over free answers ends once the branches that still run can no longer change who wins. The winner is the
            same; the branches that are cut have no vote, so `agreement` may be lower.
        answer_pattern: a regular expression with one group; free answers count as the same where its last match in them is. None, or no
            match: the whole answer.
    """

    question: Question
    options: Sequence[str | Sequence[int]] | None = None
    experts: Sequence[str] | Mapping[str, float] | None = None
    top_k: int = 3
    aggregate: str = "vote"
    profile: Mapping[str, str] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    early_end: bool = True
    answer_pattern: str | None = None


@dataclass(frozen=True)
class ExpertAnswer:
    """One branch's answer.

    Attributes:
        logprob: sum over its tokens, before temperature; under `mixture` and `product` the expert's own, of the tokens that the pool chose.
        tokens: its ids, an end token included; of a chosen option, the option's.
        finish_reason: "stop" (an end token or a stop string), "length", "option", or "vote": cut when the vote was decided, not counted.
    """

    expert: str
    weight: float
    text: str
    logprob: float
    tokens: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Answer:
    """The committee's answer.

    Attributes:
        text: the winner's, as its best ballot puts it; under `mixture` and `product` the pool's own; under `compose` the base's.
        routing: every expert asked, with its weight.
        gated: whether the base answered alone since culture was not at stake.
        experts: the branches' answers, in routing's order.
        votes: summed weight of every answer given (what `answer_pattern` finds in it), best first. Answers that differ in case or final
            punctuation are one.
        options: the pooled probability of every option; None for a free answer.
        agreement: the winner's weight over all asked weight.
        diversity_entropy: bits, over the votes' shares of the weight.
        usage: tokens: context (of which cached; the others were computed), branch (rows of soft prompts, headers, answers and options),
            generated; steps_saved: what the branches that were cut could still have generated, at most.
        timing: seconds: prefill (from submission until the contexts are computed), route (the router's own), branch_start (until the first
            token or score; next to nothing where context and branches fit into one step), decode (until the last branch ended), aggregate,
            total; under `compose` also compose.
    """

    text: str
    routing: list[tuple[str, float]]
    gated: bool
    experts: list[ExpertAnswer]
    votes: dict[str, float]
    options: list[float] | None
    agreement: float
    diversity_entropy: float
    usage: dict[str, int]
    timing: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ScoreResult:
    """How likely every expert finds every option.

    Attributes:
        experts: names; `["base"]` for the base alone.
        logprobs: float32 `[experts, options]`, natural log, summed over an option's tokens.
        weights: float32 `[experts]`, summing to one.
        pooled: float32 `[options]`, `sum_e w_e softmax_over_options(logprobs[e])`.
        usage: as an Answer's.
    """

    experts: list[str]
    logprobs: Tensor
    weights: Tensor
    pooled: Tensor
    usage: dict[str, int]


@dataclass(frozen=True)
class Routed:
    """The request has started: these experts are asked. A `gated` one asks the base alone."""

    request_id: int
    routing: list[tuple[str, float]]
    gated: bool = False


@dataclass(frozen=True)
class Token:
    """A branch's next token, or the pool's or the composed answer's (`expert=None`).

    Attributes:
        text: what became certain with it: empty while a character or a possible stop string is incomplete.
        logprob: of the token, before temperature; the pool's for the pool.
    """

    request_id: int
    expert: str | None
    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Finished:
    """A branch is done."""

    request_id: int
    answer: ExpertAnswer


@dataclass(frozen=True)
class Standing:
    """How a vote over free answers stands, after every step in which a branch ended.

    Attributes:
        votes: answers as they were first given, and their summed weights, best first.
        running: summed weight of the branches that still run.
        decided: whether they can no longer change who wins.
    """

    request_id: int
    votes: list[tuple[str, float]]
    running: float
    decided: bool


@dataclass(frozen=True)
class Done:
    """The request is done."""

    request_id: int
    answer: Answer


@dataclass(frozen=True)
class Scored:
    """A scoring request is done."""

    request_id: int
    result: ScoreResult


@dataclass(frozen=True)
class Failed:
    """The request could not be run: `error` says why."""

    request_id: int
    error: str


Event: TypeAlias = Routed | Token | Finished | Standing | Done | Scored | Failed
