"""The whole of it: what is to be computed, computed; rows, figures and intervals; one report as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from whispers_engine.experts import Expert

from .bootstrap import RESAMPLES, Resampler
from .cast import BASE, Cast, Team, expert_key
from .compute import Computer, Job, Progress, instructions, profile_of, ways_to_tell
from .curves import curves_of
from .data import FORMS, Asked, Dataset
from .figures import Section
from .routing import Router, measure
from .rows import Row, Scores, general_rows, needed, team_rows
from .table import Table

VERSION = 1
METRICS = {"dist": "similarity", "answer": "accuracy"}
_TIMED = 16  # questions


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Args:
        top_k: experts that a router asks.
        profile: whether routers are also measured with the culture in a profile.
        resamples, seed: of the bootstrap.
    """

    top_k: int = 3
    profile: bool = True
    resamples: int = RESAMPLES
    seed: int = 0


class Evaluation:
    """One evaluation of committees on a file.

    Args:
        asked: questions for routers alone.
        train: what the table is made of; None: no table.
    """

    def __init__(
        self,
        computer: Computer,
        cast: Cast,
        dataset: Dataset,
        train: Dataset | None,
        asked: Sequence[Asked],
        settings: Settings,
    ):
        self._computer = computer
        self._cast = cast
        self._dataset = dataset
        self._table = None if train is None else Table(train)
        self._asked = asked
        self._settings = settings
        self._routers = {team.label: Router(team, computer, settings.top_k) for team in cast.teams if team.known}
        self._readers = tuple({one.router.reader.key: one.router.reader for one in self._routers.values()}.values())
        self._ways = ways_to_tell(computer.engine)
        self._told = [
            Job(dataset.source.where(item.record), instructions(culture, item.prompt)[way], item.options, (BASE,))
            for culture in dataset.cultures
            for item in dataset.items
            if culture in item.targets
            for way in self._ways
        ]

    # --- computing -------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuses what cannot be scored, naming file and line, before anything is computed."""
        everyone = [expert_key(expert) for team in self._cast.teams for expert in team.experts.values()]
        self._computer.check([self._job(at, (*self._always, *everyone)) for at in range(len(self._dataset.items))])
        self._computer.check(self._told)

    @property
    def units(self) -> int:
        """Of progress."""
        return len(self._dataset.items) + len(self._told) + self._texts * len(self._readers) + len(self._timed)

    @property
    def _texts(self) -> int:
        return len(self._asked) + (len(self._dataset.cultures) if self._settings.profile else 0)

    @property
    def _always(self) -> tuple[str, ...]:
        return (BASE, *([expert_key(self._cast.blind)] if self._cast.blind is not None else []))

    def _job(self, at: int, experts: Sequence[str]) -> Job:
        item = self._dataset.items[at]
        return Job(self._dataset.source.where(item.record), item.prompt, item.options, tuple(experts))

    def compute(self, progress: Progress) -> None:
        computer, dataset, profile = self._computer, self._dataset, self._settings.profile
        profiles = [profile_of(culture) for culture in dataset.cultures] if profile else []
        for reader in self._readers:
            computer.read([*profiles, *(one.question for one in self._asked)], reader, progress, "router")
        some = 16
        for first in range(0, len(dataset.items), some):
            indices = range(first, min(first + some, len(dataset.items)))
            for reader in self._readers:  # before they are scored: who is asked can depend on it
                computer.read([dataset.items[at].prompt for at in indices], reader)
            jobs = []
            for at in indices:
                experts = [
                    key
                    for team in self._cast.teams
                    for key in needed(dataset.items[at], team, self._routers.get(team.label), dataset, profile)
                ]
                jobs.append(self._job(at, (*self._always, *experts)))
            computer.run(jobs, "questions", progress)
        computer.run(self._told, "base, told in words", progress)
        computer.time(list(self._timed_jobs.values()), "latency", progress)

    @property
    def _timed(self) -> list[Job]:
        return [job for jobs in self._timed_jobs.values() for job in jobs]

    @property
    def _timed_jobs(self) -> dict[str, list[Job]]:
        """What is timed: the base; each committee's one expert, and as many as a router asks."""
        items = self._dataset.items
        sample = list(dict.fromkeys(np.linspace(0, len(items) - 1, min(_TIMED, len(items))).astype(int).tolist()))
        found = {"base": [self._job(at, (BASE,)) for at in sample]}
        for team in self._cast.teams:
            keys = [expert_key(expert) for expert in team.experts.values()]
            several = min(self._settings.top_k, len(keys))
            for count in dict.fromkeys((1, several)):
                name = f"{team.label}: {count} expert{'s' * (count > 1)}"
                found[name] = [self._job(at, keys[:count]) for at in sample]
        return found

    # --- the report ------------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Of what has been computed; plain data for JSON, the same for the same store."""
        settings, dataset = self._settings, self._dataset
        rows, scores = self._rows(), Scores(self._computer)
        resampler = Resampler(dataset.clusters, settings.resamples, settings.seed)
        sections = {}
        for form in FORMS:
            pairs = dataset.pairs(form)
            if len(pairs):
                section = Section(dataset, self._cast, self._routers, pairs, rows, scores, resampler)
                sections[METRICS[form]] = section.to_dict()
        routing = {
            label: measure(router, dataset, self._asked, settings.resamples, settings.seed, settings.profile)
            for label, router in self._routers.items()
        }
        return {
            "version": VERSION,
            "file": str(dataset.source.path),
            "sha256": dataset.source.sha256,
            "cultures": list(dataset.cultures),
            "left_out": dict(dataset.left_out),
            "questions": len(dataset.items),
            "clusters": dataset.clusters,
            "settings": vars(settings),
            "base": self._computer.engine.model_name,
            "fingerprint": self._computer.engine.fingerprint,
            "dtype": str(self._computer.engine.model.dtype).removeprefix("torch."),
            "committees": [self._about(team) for team in self._cast.teams],
            "blind": None if self._cast.blind is None else self._cast.blind.name,
            "metrics": sections,
            "routing": routing,
            "latency": self._latency(),
            "curves": self._curves(),
        }

    def _rows(self) -> list[Row]:
        scores = Scores(self._computer)
        rows = general_rows(scores, self._table, self._cast, self._ways)
        for team in self._cast.teams:
            router = self._routers.get(team.label)
            rows += team_rows(scores, team, router, self._dataset, self._settings.profile)
        return rows

    def _about(self, team: Team) -> dict[str, Any]:
        return {
            "label": team.label,
            "folder": str(team.folder),
            "placements": team.placements,
            "router": None if team.router is None else team.router.kind,
            "experts": [
                {"name": name, "culture": expert.culture, "placement": expert.placement, "content": expert.content_hash}
                for name, expert in team.experts.items()
            ],
            # What an expert has learned from is no test of it.
            "trained_on_this_file": [
                name for name, expert in team.experts.items() if _data(expert) == self._dataset.source.sha256
            ],
            "unknown_to_router": [name for name in team.experts if team.router is not None and name not in team.known],
        }

    def _latency(self) -> list[dict[str, Any]]:
        found = []
        groups = self._timed_jobs
        times = self._computer.time(list(groups.values()), "", lambda what, units: None)
        for name, seconds in zip(groups, times, strict=True):
            found.append(
                {"who": name, "questions": len(seconds), "median_ms": round(float(np.median(seconds)) * 1e3, 2),
                 "p90_ms": round(float(np.quantile(seconds, 0.9)) * 1e3, 2)}
            )  # fmt: skip
        return found

    def _curves(self) -> list[dict[str, Any]]:
        """What the experts' training records say of their losses, as they say it."""
        experts = [(team.label, expert) for team in self._cast.teams for expert in team.experts.values()]
        if self._cast.blind is not None:
            experts.append(("blind", self._cast.blind))
        return [
            {"committee": label, "expert": expert.name, "curves": curves}
            for label, expert in experts
            if (curves := curves_of(expert.record))
        ]


def _data(expert: Expert) -> Any:
    """The hash of the file that an expert was trained on, where its record says so."""
    data = expert.record.get("data")
    return data.get("sha256") if isinstance(data, dict) else None
