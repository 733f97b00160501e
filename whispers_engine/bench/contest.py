"""Contenders in turn: every one runs once a round, so that a drift of the clocks meets all alike, and is compared round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .measure import first_line, summary

OURS = "ours"
Run = Callable[[], list[float]]  # milliseconds of each of a run's steps
Rounds = list[list[float]]  # of one contender: every round's steps

Report = dict[str, Any]


def in_turn(
    runs: Mapping[str, Run], rounds: int, progress: Callable[[str], None] = lambda what: None
) -> tuple[dict[str, Rounds], dict[str, str]]:
    """Runs everybody `rounds` times in turn, after a warm-up that does not count.

    Returns:
        What each gave in each round; and those that failed, with the reason. A failure of ours is raised.
    """
    times: dict[str, Rounds] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            if name in failed:
                continue
            progress(f"{name}, {'warm-up' if round_ == 0 else f'round {round_} of {rounds}'}")
            try:
                steps = run()
            except Exception as error:  # a peer's failure is its own, whatever it raises
                if name == OURS:
                    raise
                failed[name] = first_line(error)
                del times[name]
                continue
            if round_:
                times[name].append(steps)
    return times, failed


def compare(times: Mapping[str, Rounds], settings: Mapping[str, tuple[str, str]] | None = None) -> Report:
    """What the rounds say: medians, and the ratios to ours both of the medians and round by round.

    Args:
        times: of ours and of the peers.
        settings: for a contender that is one setting of a peer: the peer and the setting. The faster setting is the peer.
    """
    of_round = {name: [statistics.median(steps) for steps in rounds] for name, rounds in times.items()}
    ours = of_round[OURS]
    mine = summary(ours, "clock")
    found: dict[str, Report] = {}
    for name, theirs in of_round.items():
        if name == OURS:
            continue
        peer, setting = (settings or {}).get(name, (name, ""))
        time = summary(theirs, "clock")
        ratios = [one / other for one, other in zip(theirs, ours, strict=True)]
        entry = {
            "ms": time.ms,
            "ratio": time.ms / mine.ms,
            "spread": time.spread,
            "ratio_of_rounds": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
            "rounds_ms": theirs,
        }
        if setting:
            entry["setting"] = setting
            entry["settings"] = {**found.get(peer, {}).get("settings", {}), setting: time.ms}
        if peer in found and found[peer]["ms"] <= time.ms:
            found[peer]["settings"] = entry["settings"]
        else:
            found[peer] = entry
    return {"ours_ms": mine.ms, "spread": mine.spread, "rounds_ms": ours, "peers": found}


def hardest(peers: Mapping[str, Report], names: Sequence[str]) -> Report | None:
    """The fastest of these peers, with its ratio to ours; None where none of them was measured."""
    measured = [(peers[name]["ms"], name) for name in names if name in peers]
    if not measured:
        return None
    name = min(measured)[1]
    return {"peer": name, "ratio": peers[name]["ratio"]}


def share_equal(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of tokens `[E][n]` on which two agree, as far as both have some."""
    pairs = [
        one == other for mine, peer in zip(ours, theirs, strict=True) for one, other in zip(mine, peer, strict=False)
    ]
    return sum(pairs) / len(pairs)
