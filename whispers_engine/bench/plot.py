"""Pictures: how much faster than the best peer against the shared context, one line a size; and the milliseconds of whole steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whispers_engine.errors import WhispersError
from whispers_engine.files import new_file

FORMATS = ("png", "svg")
# One hue from light to dark, since the number of experts is a quantity.
_COLOURS = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")


def check_plot(path: Path) -> None:
    """Raises WhispersError for a file that could not be written, before anything is measured."""
    if path.suffix.removeprefix(".") not in FORMATS:
        raise WhispersError(f"--plot {path}: accepted: a name that ends in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise WhispersError(f"--plot {path}: {path.parent} is no folder")
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise WhispersError("--plot: needs matplotlib: pip install 'whispers-engine[bench]'") from error


def plot_ratios(report: dict[str, Any], path: Path) -> None:
    """Draws a report's attention results into a PNG or SVG, one panel for each model's heads."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    results = [r for r in report["results"] if r["op"] == "committee_attention" and r.get("peers")]
    if not results:
        raise WhispersError(f"--plot {path}: nothing was measured that could be drawn")
    panels = list(dict.fromkeys(result["heads"] for result in results))
    figure = Figure(figsize=(4.2 * len(panels) + 0.6, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    sizes = sorted({result["experts"] for result in results})
    for heads, axis in zip(panels, axes, strict=True):
        for index, experts in enumerate(sizes):
            line = sorted(
                (r["context"], min(peer["ratio"] for peer in r["peers"].values()))
                for r in results
                if (r["heads"], r["experts"]) == (heads, experts)
            )
            colour = _COLOURS[min(len(_COLOURS) - 1, index * len(_COLOURS) // len(sizes))]
            name = f"{experts} expert{'s' * (experts > 1)}"
            axis.plot([x for x, _ in line], [y for _, y in line], marker="o", ms=3.5, color=colour, label=name)
        axis.axhline(1.0, color="#888888", lw=0.8, ls="--")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(sorted({result["context"] for result in results}))
        axis.set_title(heads, fontsize=10)
        axis.set_xlabel("shared keys")
        axis.grid(visible=True, color="#e5e5e5", lw=0.6)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("time of the best peer / ours")
    axes[-1].legend(fontsize=8, frameon=False)
    names = sorted({name for result in results for name in result["peers"]})
    figure.suptitle(f"Decode attention, {report['device']}, beside {', '.join(names)}", fontsize=10)
    with new_file(path) as half_written:
        figure.savefig(half_written, dpi=150)


def plot_times(report: dict[str, Any], path: Path) -> None:
    """Draws a report of `bench decode` or `bench prefill`: milliseconds of everybody, over E for every S and over S for every E."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    results = [result for result in report["results"] if "ours_ms" in result]
    if not results:
        raise WhispersError(f"--plot {path}: nothing was measured that could be drawn")
    panels: list[tuple[str, str, str, list[dict[str, Any]]]] = []
    for over, fixed, label, title in (
        ("experts", "context", "experts", "tokens of context: {}"),
        ("context", "experts", "tokens of context", "experts: {}"),
    ):
        for value in sorted({result[fixed] for result in results}):
            line = sorted((r for r in results if r[fixed] == value), key=lambda r: r[over])
            if len(line) > 1:
                panels.append((over, label, title.format(value), line))
    panels = panels or [("experts", "experts", f"tokens of context: {results[0]['context']}", results)]
    names = list(dict.fromkeys(name for result in results for name in result["peers"]))
    figure = Figure(figsize=(4.2 * len(panels) + 0.6, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for (over, label, title, line), axis in zip(panels, axes, strict=True):
        floor = [(r[over], r["floor_ms"]) for r in line]
        axis.plot(*zip(*floor, strict=True), color="#888888", lw=0.8, ls="--", label="floor")
        for name, colour in zip(names, _peer_colours(len(names)), strict=True):
            points = [(r[over], r["peers"][name]["ms"]) for r in line if name in r["peers"]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=3.5, lw=1.2, color=colour, label=name)
        ours = [(r[over], r["ours_ms"]) for r in line]
        axis.plot(*zip(*ours, strict=True), marker="o", ms=4.5, lw=2.2, color=_COLOURS[-1], label="whispers-engine")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks([r[over] for r in line])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
        axis.grid(visible=True, color="#e5e5e5", lw=0.6)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("milliseconds a step" if results[0]["op"] == "decode_step" else "milliseconds")
    axes[-1].legend(fontsize=8, frameon=False)
    what = "Decode steps" if results[0]["op"] == "decode_step" else "Prefill"
    figure.suptitle(f"{what} of {report['model']}, {results[0]['dtype']}, {report['device']}", fontsize=10)
    with new_file(path) as half_written:
        figure.savefig(half_written, dpi=150)


def _peer_colours(count: int) -> list[str]:
    """Peers are kinds, not quantities: hues of their own, away from the blue of ours."""
    hues = ("#e6550d", "#fdae6b", "#31a354", "#a1d99b", "#756bb1", "#bcbddc")
    return [hues[index % len(hues)] for index in range(count)]
