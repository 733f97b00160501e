"""One answer of many: the vote, its ties, and how far the experts agreed."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .errors import WhispersError

AGGREGATIONS = ("vote", "delegate", "mixture", "product", "compose")
POOLED = ("mixture", "product")  # all branches append the same token, chosen from the pooled distribution
_MEANINGFUL = "%‰#&@*"  # Unicode's punctuation, but "50%" is not "50", nor "C#" "C"
_SAME = 1e-9  # weights this close are equal: 0.1 + 0.2 ties with 0.3


def check_aggregation(name: str) -> str:
    if name not in AGGREGATIONS:
        raise WhispersError(f"aggregate: {name!r}; accepted: {', '.join(AGGREGATIONS)}")
    return name


def normalise(text: str) -> str:
    """What two answers must share to count as the same: NFKC, case folded, stripped, without final punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    text = unicodedata.normalize("NFKC", folded).strip()  # folding can take a letter and its accents apart
    while text and unicodedata.category(text[-1]).startswith("P") and text[-1] not in _MEANINGFUL:
        text = text[:-1].rstrip()
    return text


def voted_part(text: str, pattern: re.Pattern[str] | None) -> str:
    """What of an answer is voted on: the group of the pattern's last match, or all of it where there is no pattern or no match."""
    found = None if pattern is None else deque(pattern.finditer(text), maxlen=1)
    return (found[0][1] or "") if found else text


def answer_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compiles a pattern with exactly one group. Raises WhispersError for anything else."""
    if pattern is None:
        return None
    accepted = r"None, or a regular expression with one group, such as 'Answer: (\w+)'"
    if not isinstance(pattern, str):
        raise WhispersError(f"answer_pattern: {pattern!r}; accepted: {accepted}")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise WhispersError(f"answer_pattern: {pattern!r}: {error}; accepted: {accepted}") from error
    if compiled.groups != 1:
        raise WhispersError(f"answer_pattern: {pattern!r} has {compiled.groups} groups; accepted: {accepted}")
    return compiled


@dataclass(frozen=True)
class Ballot:
    """One expert's vote."""

    expert: str
    weight: float
    choice: Hashable  # equal choices add up: a normalised answer, or an option's index
    mean_logprob: float  # per token


@dataclass(frozen=True)
class Tally:
    """The outcome of a vote."""

    winner: int  # index of the winning choice's best ballot
    votes: tuple[tuple[int, float], ...]  # (index of the choice's best ballot, summed weight), best first
    agreement: float  # the winner's weight over all asked weight
    diversity_entropy: float  # bits, over the choices' shares of the weight


def _ranks(values: Sequence[float]) -> list[int]:
    """Every value's place, 0 for the largest; values that are the same up to rounding have the same place."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    places, place = [0] * len(values), 0
    for before, index in pairwise(order):
        place += values[before] - values[index] > _SAME
        places[index] = place
    return places


def tally(ballots: Sequence[Ballot], asked_weight: float = 1.0, winner: Hashable | None = None) -> Tally:
    """Weighted plurality. Of tied choices, the one whose best ballot is heaviest wins, then likeliest per token, then first by name.

    Args:
        ballots: of the branches that finished; at least one.
        asked_weight: of all branches, finished or not.
        winner: a choice that something else than the vote has made the winner (a pool); None: the vote decides.
    """
    by_choice: dict[Hashable, list[int]] = {}
    for index, ballot in enumerate(ballots):
        by_choice.setdefault(ballot.choice, []).append(index)

    places = _ranks([ballot.weight for ballot in ballots])

    def strength(index: int) -> tuple[int, float, str]:  # the smaller, the stronger
        return places[index], -ballots[index].mean_logprob, ballots[index].expert

    totals = {
        min(indices, key=strength): math.fsum(ballots[index].weight for index in indices)
        for indices in by_choice.values()
    }
    of_total = dict(zip(totals, _ranks(list(totals.values())), strict=True))
    votes = sorted(totals.items(), key=lambda item: (of_total[item[0]], strength(item[0])))
    won = votes[0][0] if winner is None else next((i for i, _ in votes if ballots[i].choice == winner), None)
    finished = math.fsum(totals.values())
    shares = [weight / finished for weight in totals.values() if weight > 0] if finished > 0 else []
    return Tally(
        winner=-1 if won is None else won,
        votes=tuple(votes),
        agreement=0.0 if won is None or asked_weight <= 0 else totals[won] / asked_weight,
        diversity_entropy=-math.fsum(share * math.log2(share) for share in shares) + 0.0,
    )


def decided(votes: Mapping[Any, float], running: float) -> bool:
    """Whether a vote has its winner whatever the branches that still run, of this summed weight, may answer.

    They may all choose the runner-up, or something new. A lead that is no more than a tie decides nothing: ties are broken by the ballots.
    """
    first, second = [*sorted(votes.values(), reverse=True), 0.0, 0.0][:2]
    return first - second - running > _SAME
