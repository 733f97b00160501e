"""The targets on one H100, and what a suite's reports say about them: a verdict where it was measured, never an estimate where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Report = dict[str, Any]

LARGE = 128e6  # necessary bytes from which a launch's fixed costs are no excuse
LONG = 2048  # shared keys
NOT_MEASURED = "not measured"
_SDPA = "sdpa-repeated"


class Measured(NamedTuple):
    """One value that counts for a target, and where it was seen."""

    value: float
    where: str


class Target(NamedTuple):
    """A target: the worst of what counts for it must be on the right side of the threshold."""

    text: str
    threshold: float
    at_least: bool  # or at most
    counts: Callable[[Sequence[Report], Sequence[Report]], Iterator[Measured]]  # of kernel and of throughput reports
    kernels: bool = True  # whether the sweep over decode attention decides it, or whole steps


def _attention(kernels: Sequence[Report]) -> Iterator[tuple[Report, Report, str]]:
    for report in kernels:
        for result in report["results"]:
            if result["op"] == "committee_attention" and "ours_ms" in result:
                yield report["ceilings"], result, f"{result['heads']}, E {result['experts']}, S {result['context']}"


def _bandwidth(kernels: Sequence[Report], throughput: Sequence[Report]) -> Iterator[Measured]:
    for top, result, where in _attention(kernels):
        if result["bytes"] >= LARGE and result["limit"] == "bandwidth":
            yield Measured(result["GB_s"] / top["GB_s"], where)


def _matrix(kernels: Sequence[Report], throughput: Sequence[Report]) -> Iterator[Measured]:
    for top, result, where in _attention(kernels):
        if result["bytes"] >= LARGE and result["limit"] == "matrix":
            yield Measured(result["TFLOP_s"] * 1e3 / top["GFLOP_s"], where)


def _best_peer(kernels: Sequence[Report], throughput: Sequence[Report]) -> Iterator[Measured]:
    for _, result, where in _attention(kernels):
        if result["experts"] >= 2 and result["peers"]:
            name, peer = min(result["peers"].items(), key=lambda item: item[1]["ratio"])
            yield Measured(peer["ratio"], f"{where}, {name}")


def _repeated(kernels: Sequence[Report], throughput: Sequence[Report]) -> Iterator[Measured]:
    """The ratio over what is asked of it, min(E/2, 0.7 of what the floor allows): the floor allows SDPA's time over the floor's."""
    for _, result, where in _attention(kernels):
        if result["context"] >= LONG and _SDPA in result["peers"]:
            allowed = result["peers"][_SDPA]["ms"] / result["floor_ms"]
            asked = min(result["experts"] / 2, 0.7 * allowed)
            ratio = result["peers"][_SDPA]["ratio"]
            yield Measured(ratio / asked, f"{where}: {ratio:.3g} times, asked {asked:.3g}")


def _steps(throughput: Sequence[Report]) -> Iterator[tuple[Report, str]]:
    for report in throughput:
        for result in report["results"]:
            if result["shape"] == "llama-8b" and "ours_ms" in result:
                yield result, f"llama-8b, E {result['experts']}, S {result['context']}"


def _committee(kernels: Sequence[Report], throughput: Sequence[Report]) -> Iterator[Measured]:
    for result, where in _steps(throughput):
        if result["experts"] == 8 and result["context"] == LONG and result["over_one_expert"] is not None:
            yield Measured(result["over_one_expert"], where)


def _step_floor(kernels: Sequence[Report], throughput: Sequence[Report]) -> Iterator[Measured]:
    for result, where in _steps(throughput):
        yield Measured(result["ours_ms"] / result["floor_ms"], where)


TARGETS = (
    Target(
        "decode attention, necessary bytes >= 128 MB, not matrix-bound: share of copy bandwidth", 0.85, True, _bandwidth
    ),
    Target(
        "decode attention, necessary bytes >= 128 MB, matrix-bound: share of the bf16 matrix peak", 0.60, True, _matrix
    ),
    Target("every shape of the sweep with E >= 2: time of the best peer / ours", 0.95, True, _best_peer),
    Target("S >= 2k: times SDPA on repeated caches, over min(E/2, 0.7 of what the floor allows)", 1.0, True, _repeated),
    Target("8B, 2k tokens: decode step of 8 experts / of one", 1.25, False, _committee, kernels=False),
    Target("8B: decode step / byte floor (weights + cache)", 1.25, False, _step_floor, kernels=False),
)


def verdicts(kernels: Sequence[Report], throughput: Sequence[Report]) -> list[Report]:
    """Every target with its threshold, the worst value that counts for it, where that was seen, and the verdict.

    Where one shape is wrong, no target on attention has a value. A target that says "every shape" is met for good only by all of them.
    """
    wrong = [
        f"{result['heads']}, E {result['experts']}, S {result['context']}"
        for report in kernels
        for result in report["results"]
        if result["op"] == "committee_attention" and not result["ok"]
    ]
    missing = [{what for what in report["left_out"] if what.startswith("attention")} for report in kernels]
    rows = []
    for target in TARGETS:
        seen = [] if target.kernels and wrong else list(target.counts(kernels, throughput))
        row: Report = {
            "target": target.text,
            "threshold": target.threshold,
            "sense": "at least" if target.at_least else "at most",
            "measured": None,
            "verdict": NOT_MEASURED,
        }
        if seen:
            worst = (min if target.at_least else max)(seen, key=lambda value: value.value)
            met = worst.value >= target.threshold if target.at_least else worst.value <= target.threshold
            row |= {"measured": worst.value, "verdict": "met" if met else "missed", "where": worst.where}
            row["values"] = len(seen)
            if target.kernels and missing:
                # Each report has other peers: of the best peer, all of them must have seen a shape; of ours, any.
                unseen = set.union(*missing) if target.counts is _best_peer else set.intersection(*missing)
                row["shapes_not_reached"] = len(unseen)
                if met and unseen:
                    row["verdict"] = "met so far"
        elif target.kernels and wrong:
            row["where"] = f"wrong: {'; '.join(wrong)}"
        rows.append(row)
    return rows
