"""Who is asked: committees for one base, each culture's expert in each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from whispers_engine.errors import WhispersError
from whispers_engine.experts import Committee, Expert

if TYPE_CHECKING:
    from whispers_engine.engine import Engine
    from whispers_engine.router import Router

BASE = "base"


def expert_key(expert: Expert) -> str:
    """Names the function that an expert makes of the base, whatever the expert is called."""
    return f"{expert.placement}:{expert.content_hash[:32]}"


@dataclass(frozen=True, eq=False)
class Team:
    """One committee.

    Attributes:
        label: what it is called in the report.
        experts: by name, in the committee's order.
        of: cultures, and their experts' names.
    """

    label: str
    folder: Path
    experts: Mapping[str, Expert]
    of: Mapping[str, str]
    router: Router | None

    @property
    def known(self) -> list[str]:
        """The experts that its router knows."""
        return [name for name, expert in self.experts.items() if self.router is not None and self.router.knows(expert)]

    @property
    def placements(self) -> list[str]:
        return sorted({expert.placement for expert in self.experts.values()})

    @property
    def shares_context(self) -> bool:
        """Whether asking all costs no context more than asking one."""
        return "prefix" not in self.placements

    def key(self, culture: str) -> str:
        """Of the culture's expert."""
        return expert_key(self.experts[self.of[culture]])


@dataclass(frozen=True, eq=False)
class Cast:
    """All committees, and the one expert that knows no culture."""

    base_name: str | None  # None: no committee says
    fingerprint: str | None
    teams: tuple[Team, ...]
    blind: Expert | None

    @property
    def cultures(self) -> list[str] | None:
        """Those with an expert in every committee, so that rows are measured on the same pairs; None without a committee."""
        if not self.teams:
            return None
        return [culture for culture in self.teams[0].of if all(culture in team.of for team in self.teams)]

    def engage(self, engine: Engine) -> dict[str, str]:
        """Adds every expert to an engine, once; returns the engine's names for them by `expert_key`.

        Raises:
            WhispersError: experts that were made for another base, or for which the engine has no room.
        """
        if self.fingerprint not in (None, engine.fingerprint):
            raise WhispersError(
                f"the committee was made for the base {self.base_name} ({self.fingerprint}); {engine.model_name} is "
                f"{engine.fingerprint}"
            )
        for team in self.teams:
            engine.router = team.router  # refused where it reads another base's hidden states
        engine.router = None  # whom to ask is decided outside
        everyone = [expert for team in self.teams for expert in team.experts.values()]
        names = {BASE: BASE}
        for expert in [*everyone, *([self.blind] if self.blind is not None else [])]:
            key = expert_key(expert)
            if key not in names:
                names[key] = f"e{len(names)}"  # two committees may call theirs the same
                engine.add_expert(replace(expert, name=names[key]))
        return names


def read_cast(committees: Sequence[Path], blind: Path | None) -> Cast:
    """Reads committees and checks that they can be measured side by side.

    Raises:
        WhispersError: two bases, a committee in which several experts speak for one culture or none for any, a blind committee that is
            not of one expert.
    """
    loaded = [(folder, Committee.load(folder)) for folder in committees]
    single = None if blind is None else Committee.load(blind)
    for folder, committee in [*loaded, *([] if blind is None or single is None else [(blind, single)])]:
        first = loaded[0][1] if loaded else committee
        if committee.fingerprint != first.fingerprint:
            raise WhispersError(
                f"{folder}: made for the base {committee.base_name} ({committee.fingerprint}); accepted beside {committees[0]}: "
                f"{first.base_name} ({first.fingerprint})"
            )
    if single is not None and len(single.experts) != 1:
        raise WhispersError(f"--blind {blind}: {len(single.experts)} experts; accepted: a committee of one")
    teams: list[Team] = []
    for folder, committee in loaded:
        label = folder.resolve().name
        taken = sum(team.label.split("#")[0] == label for team in teams)
        teams.append(_team(f"{label}#{taken + 1}" if taken else label, folder, committee))
    some = loaded[0][1] if loaded else single
    return Cast(
        None if some is None else some.base_name,
        None if some is None else some.fingerprint,
        tuple(teams),
        None if single is None else single.experts[0],
    )


def _team(label: str, folder: Path, committee: Committee) -> Team:
    of: dict[str, str] = {}
    for expert in committee.experts:
        if expert.culture is None:
            continue
        if expert.culture in of:
            raise WhispersError(
                f"{folder}: {of[expert.culture]} and {expert.name} both speak for {expert.culture!r}; accepted: one expert a culture, "
                "and a committee of its own for each placement"
            )
        of[expert.culture] = expert.name
    if not of:
        raise WhispersError(f"{folder}: no expert has a culture; accepted: experts whose expert.json names one")
    return Team(label, folder, {expert.name: expert for expert in committee.experts}, of, committee.router)


def deranged(cultures: Sequence[str]) -> dict[str, str]:
    """Another culture for each: the one half-way round in alphabetical order. None of them for a single one."""
    ordered = sorted(cultures)
    half = len(ordered) // 2
    return {culture: ordered[(at + half) % len(ordered)] for at, culture in enumerate(ordered) if half}
