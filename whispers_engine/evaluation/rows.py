"""The rows of the table: for every question and culture, what each way of answering gives as probabilities of the options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from whispers_engine.aggregate import Ballot, tally
from whispers_engine.chat import Question

from .cast import BASE, Cast, Team, deranged, expert_key
from .compute import Computer, Job, instructions
from .data import Dataset, Item, Pairs
from .metrics import Floats
from .routing import Router, Weights
from .table import Table

AGGREGATES = ("mixture", "product", "vote", "delegate")


@dataclass(frozen=True)
class Outcome:
    """What one way of answering says to one question of one culture.

    Attributes:
        p: float64 `[options]`, summing to one.
        chosen: the option that it answers with, where that is not simply the likeliest; else -1.
        asked: names of the experts asked, heaviest first; empty for a row that asks none or is told whom to ask.
        entropy: bits, of the votes' weights; NaN where nobody votes.
    """

    p: Floats
    chosen: int = -1
    asked: tuple[str, ...] = ()
    entropy: float = float("nan")


Answering = Callable[[Item, str], Outcome | None]  # None: it has no answer to this one


@dataclass(frozen=True)
class Row:
    """A way of answering: its name in JSON, its name in tables, what it does."""

    key: str
    label: str
    answer: Answering
    team: str | None = None  # the label of the committee that it asks


@dataclass(frozen=True, eq=False)
class Answers:
    """One row's answers to all pairs of one form.

    Attributes:
        p: float64 `[pairs, options]`; NaN for a pair that it has no answer to.
        chosen: int64 `[pairs]`.
        outcomes: one a pair.
    """

    row: Row
    p: Floats
    chosen: NDArray[np.int64]
    outcomes: tuple[Outcome | None, ...]


def answer_all(row: Row, dataset: Dataset, pairs: Pairs) -> Answers:
    p = np.zeros_like(pairs.target)
    outcomes = tuple(
        row.answer(dataset.items[item], dataset.cultures[culture])
        for item, culture in zip(pairs.item.tolist(), pairs.culture.tolist(), strict=True)
    )
    for at, outcome in enumerate(outcomes):
        if outcome is None:
            p[at] = np.nan
        else:
            p[at, : len(outcome.p)] = outcome.p
    chosen = np.array([-1 if outcome is None else outcome.chosen for outcome in outcomes], dtype=np.int64)
    return Answers(row, p, chosen, outcomes)


def softmax(logprobs: NDArray[np.float32]) -> Floats:
    """Of option log-probabilities, in float64."""
    value = np.exp(logprobs.astype(np.float64) - float(logprobs.max()))
    return value / value.sum()


class Scores:
    """Option probabilities that have been computed."""

    def __init__(self, computer: Computer):
        self._computer = computer

    def logprobs(self, prompt: Question, options: tuple[str, ...], expert: str) -> NDArray[np.float32]:
        return self._computer.store.logprobs(self._computer.key(Job("", prompt, options, ())), expert)

    def of(self, item: Item, expert: str) -> Floats:
        return softmax(self.logprobs(item.prompt, item.options, expert))

    def pooled(self, item: Item, team: Team, weights: Weights, aggregate: str) -> Outcome:
        """What a committee answers (docs/aggregation.md): `mixture` and `product` pool probabilities; `vote` gives every option the weight
        of those who choose it; `delegate` is the heaviest expert's answer."""
        names = [name for name, _ in weights]
        share = np.array([weight for _, weight in weights])
        logprobs = np.stack(
            [self.logprobs(item.prompt, item.options, expert_key(team.experts[name])) for name in names]
        )
        choices = logprobs.argmax(-1).tolist()
        ballots = [
            Ballot(name, weight, choice, float(row[choice]) / self._tokens(item, choice))
            for (name, weight), choice, row in zip(weights, choices, logprobs, strict=True)
        ]
        outcome = tally(ballots, float(share.sum()))
        p = np.stack([softmax(row) for row in logprobs])  # [experts, options]
        chosen = -1
        if aggregate == "mixture":
            p = share @ p
        elif aggregate == "product":
            with np.errstate(divide="ignore"):
                p = softmax((share[:, None] * np.log(p)).sum(0))
        elif aggregate == "vote":
            p = np.bincount(choices, share, minlength=p.shape[1]) / share.sum()
            chosen = choices[outcome.winner]
        else:
            p, names = p[0], names[:1]
        return Outcome(p, chosen, tuple(names), outcome.diversity_entropy)

    def _tokens(self, item: Item, option: int) -> int:
        return len(self._computer.engine.chat.option(item.options[option]))


def general_rows(scores: Scores, table: Table | None, cast: Cast, ways: Sequence[str]) -> list[Row]:
    """Rows that no committee takes part in; `ways` of telling the base whom to answer as."""

    def uniform(item: Item, culture: str) -> Outcome:
        return Outcome(np.full(len(item.options), 1 / len(item.options)))

    def base(item: Item, culture: str) -> Outcome:
        return Outcome(scores.of(item, BASE))

    def instructed(key: str) -> Answering:
        return lambda item, culture: Outcome(
            softmax(scores.logprobs(instructions(culture, item.prompt)[key], item.options, BASE))
        )

    def others(item: Item, culture: str) -> Outcome | None:
        rest = [shares for name, shares in item.targets.items() if name != culture]
        return Outcome(np.mean(rest, axis=0)) if rest else None

    rows = [Row("uniform", "uniform", uniform), Row("base", "base", base)]
    labels = {"instruction": "base, told in words", "instruction-system": "base, told by system"}
    rows += [Row(key, labels[key], instructed(key)) for key in ways]
    if table is not None:
        rows.append(
            Row(
                "table",
                "table of options",
                lambda item, culture: Outcome(table.shares(item.record.options, culture)),
            )
        )
        rows.append(
            Row("table-all", "table, all as one", lambda item, culture: Outcome(table.shares(item.record.options, None)))
        )  # fmt: skip
    if cast.blind is not None:
        key = expert_key(cast.blind)
        rows.append(Row("blind", "culture-blind prompt", lambda item, culture: Outcome(scores.of(item, key))))
    rows.append(Row("others", "others' answers", others))
    return rows


def team_rows(scores: Scores, team: Team, router: Router | None, dataset: Dataset, profile: bool) -> list[Row]:
    """Rows of one committee."""
    other = deranged(dataset.cultures)

    def row(key: str, label: str, answer: Answering) -> Row:
        return Row(f"{team.label}/{key}", label, answer, team.label)

    rows = [row("expert", "culture's expert", lambda item, culture: Outcome(scores.of(item, team.key(culture))))]
    if other:
        rows.append(
            row("other", "another's expert", lambda item, culture: Outcome(scores.of(item, team.key(other[culture]))))
        )  # fmt: skip
    if router is None:
        everyone = [(name, 1 / len(team.experts)) for name in team.experts]
        some = AGGREGATES[:3]  # nobody is the heaviest of equals
        return [*rows, *(row(f"all/{by}", f"all, {by}", _whole(scores, team, everyone, by)) for by in some)]
    for key, label, told in (("routed", "routed", False), ("told", "by profile", True)):
        if told and not profile:
            continue
        rows += [row(f"{key}/{by}", f"{label}, {by}", _routed(scores, team, router, by, told)) for by in AGGREGATES]
    return rows


def _whole(scores: Scores, team: Team, everyone: Weights, aggregate: str) -> Answering:
    return lambda item, culture: scores.pooled(item, team, everyone, aggregate)


def _routed(scores: Scores, team: Team, router: Router, aggregate: str, told: bool) -> Answering:
    def answer(item: Item, culture: str) -> Outcome:
        weights = router.ask(item.prompt, culture if told else None)
        if weights is None:
            p = scores.of(item, BASE)
            if aggregate == "vote":  # the base's is the only one
                p = np.eye(len(p))[p.argmax()]
            return Outcome(p, asked=(BASE,), entropy=0.0)
        return scores.pooled(item, team, weights[:1] if aggregate == "delegate" else weights, aggregate)

    return answer


def asks_all(team: Team, router: Router | None) -> bool:
    """Whether every expert of a team is asked every question."""
    return router is None or team.shares_context


def needed(item: Item, team: Team, router: Router | None, dataset: Dataset, profile: bool) -> Sequence[str]:
    """The experts that a team's rows ask about an item, by key: all where that costs no context more, else those of some row."""
    if router is None or asks_all(team, router):
        return [expert_key(expert) for expert in team.experts.values()]
    other: Mapping[str, str] = deranged(dataset.cultures)
    cultures = [culture for culture in dataset.cultures if culture in item.targets]
    names = [team.of[name] for culture in cultures for name in (culture, other.get(culture, culture))]
    for told in (None, *(cultures if profile else ())):
        names += [name for name, _ in router.ask(item.prompt, told) or ()]
    return [expert_key(team.experts[name]) for name in dict.fromkeys(names)]
