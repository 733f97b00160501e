"""What a committee's router does with the questions: whom it chooses, how sure it is, whether it says that culture is at stake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .bootstrap import Resampler, finite
from .cast import Team
from .compute import Computer, profile_of
from .data import Asked, Dataset
from .metrics import expected_calibration_error, reliability, wins

Weights: TypeAlias = list[tuple[str, float]]  # experts' names, heaviest first
Cluster: TypeAlias = int | str  # of the file's questions; the text of one that the router alone is asked


class Router:
    """A team's router over features that have been read.

    Args:
        team: one that has a router.
        top_k: how many experts are asked.
    """

    def __init__(self, team: Team, computer: Computer, top_k: int):
        assert team.router is not None
        self.team = team
        self.router = team.router
        self.top_k = min(top_k, len(team.known))
        self._computer = computer

    def at_stake(self, text: str) -> bool:
        return self.router.at_stake(self._feature(text))

    def stake(self, text: str) -> float:
        """The gate's score: above 0 where it says that culture is at stake."""
        return self.router.stake(self._feature(text))

    def ask(self, text: str, culture: str | None) -> Weights | None:
        """Whom a request asks; None where the gate leaves the answer to the base. `culture`: a profile that names it."""
        return self.weights(text, culture, self.top_k) if self.at_stake(text) else None

    def weights(self, text: str, culture: str | None, top_k: int | None = None) -> Weights:
        """Whom the router chooses, without its gate; `top_k=None`: weights of all that it knows."""
        profile = None if culture is None else self._feature(profile_of(culture))
        known = self.team.known
        return self.router.route(self._feature(text), profile, known, len(known) if top_k is None else top_k)

    def _feature(self, text: str) -> torch.Tensor:
        return torch.from_numpy(self._computer.feature(text, self.router.reader).copy())


@dataclass
class Found:
    """What the router said where it is known whom the question concerns."""

    first: list[float] = field(default_factory=list)  # 1 where the culture's expert is the likeliest
    among: list[float] = field(default_factory=list)  # 1 where it is among the first three
    weight: list[float] = field(default_factory=list)  # of the likeliest, among all experts
    cluster: list[Cluster] = field(default_factory=list)

    def add(self, weights: Weights, expert: str, cluster: Cluster) -> None:
        self.first.append(float(weights[0][0] == expert))
        self.among.append(float(expert in [name for name, _ in weights[:3]]))
        self.weight.append(weights[0][1])
        self.cluster.append(cluster)

    def to_dict(self, resamples: int, seed: int) -> dict[str, Any]:
        index, clusters = numbered(self.cluster)
        resampler = Resampler(clusters, resamples, seed)
        bins = reliability(np.array(self.weight), np.array(self.first))
        return {
            "top1": resampler.means(np.array(self.first), index).estimate().to_dict(),
            "top3": resampler.means(np.array(self.among), index).estimate().to_dict(),
            "ece": finite(expected_calibration_error(bins)),
            "calibration": [vars(one) for one in bins],
        }


def measure(
    router: Router, dataset: Dataset, asked: Sequence[Asked], resamples: int, seed: int, profile: bool
) -> dict[str, Any]:
    """A router's figures.

    Args:
        asked: questions for the router alone, neutral ones among them.
        profile: whether it is also told the culture of the file's questions.

    Returns:
        "named": of questions that name something of the culture, by what they name; "profile": of the file's questions, the culture in a
        profile; "gate": how well it tells the file's questions, and the others that concern a culture, from neutral ones. None where
        there are no such questions.
    """
    of = router.team.of
    linked = {item.record.question: item.cluster for item in dataset.items}
    named: dict[str, Found] = {}
    told = Found()
    for item in dataset.items:
        for culture in dataset.cultures:
            if culture not in item.targets:
                continue
            if item.names is not None:
                found = named.setdefault(item.names, Found())
                found.add(router.weights(item.prompt, None), of[culture], item.cluster)
            if profile:
                told.add(router.weights(item.prompt, culture), of[culture], item.cluster)
    for one in asked:
        if one.names is not None and one.culture is not None and one.culture in of:
            found = named.setdefault(one.names, Found())
            found.add(router.weights(one.question, None), of[one.culture], linked.get(one.question, one.question))
    together = Found()
    for found in named.values():
        for key, values in vars(found).items():
            getattr(together, key).extend(values)
    return {
        "named": {
            **{what: found.to_dict(resamples, seed) for what, found in named.items()},
            **({"all": together.to_dict(resamples, seed)} if len(named) > 1 else {}),
        }
        or None,
        "profile": told.to_dict(resamples, seed) if told.first else None,
        "gate": _gate(router, dataset, asked, linked, resamples, seed),
    }


def numbered(clusters: Sequence[Cluster]) -> tuple[NDArray[np.int64], int]:
    """Each one's number, in their order of appearance, and how many there are."""
    number = {cluster: at for at, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([number[cluster] for cluster in clusters], dtype=np.int64), len(number)


def _gate(
    router: Router,
    dataset: Dataset,
    asked: Sequence[Asked],
    linked: Mapping[str, int],
    resamples: int,
    seed: int,
) -> Mapping[str, Any] | None:
    """Every text counts once; texts of one cluster are drawn together. `linked`: the clusters of the file's question texts."""

    def clusters_of(some: Iterable[Asked]) -> dict[str, Cluster]:
        return {one.question: linked.get(one.question, one.question) for one in some}

    neutral = clusters_of(one for one in asked if one.culture is None)
    if router.router.gate is None or not neutral:
        return None
    sides: dict[str, dict[str, Cluster]] = {
        "file": {item.prompt: item.cluster for item in dataset.items},
        "questions": clusters_of(one for one in asked if one.culture is not None),
    }
    low = np.array([router.stake(text) for text in neutral])
    found: dict[str, Any] = {"neutral": len(neutral), "neutral_refused": finite(float((low <= 0).mean()))}
    for side, texts in sides.items():
        if texts:
            high = np.array([router.stake(text) for text in texts])
            index, clusters = numbered([*texts.values(), *neutral.values()])
            resampler = Resampler(clusters, resamples, seed)
            estimate = resampler.auroc(wins(high, low), index[: len(texts)], index[len(texts) :])
            found[side] = {
                "n": len(texts),
                "accepted": finite(float((high > 0).mean())),
                "auroc": {**estimate.to_dict(), "n": len(texts)},
            }
    return found
