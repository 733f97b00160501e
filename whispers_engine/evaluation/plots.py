"""Pictures of a report, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from whispers_engine.errors import WhispersError

from .view import full_label

_BLUE, _GREY = "#2171b5", "#888888"
_HUES = ("#2171b5", "#e6550d", "#31a354", "#756bb1", "#fdae6b", "#636363", "#9ecae1", "#a1d99b")


def check_plots() -> None:
    """Raises WhispersError where matplotlib is not installed, before anything is computed."""
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise WhispersError("the report's plots need matplotlib: pip install 'whispers-engine[train]'") from error


def rows_plot(section: Mapping[str, Any], metric: str) -> bytes:
    """Every row's mean with its interval."""
    rows = [row for row in section["rows"] if row["macro"]["mean"] is not None]
    figure, axis = _figure(7.5, 0.6 + 0.26 * len(rows))
    for at, row in enumerate(rows):
        one = row["macro"]
        axis.plot([one["low"], one["high"]], [at, at], color=_BLUE, lw=1.6, solid_capstyle="butt")
        axis.plot([one["mean"]], [at], "o", ms=4, color=_BLUE)
    axis.set_yticks(range(len(rows)), [full_label(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"{metric}, mean of the cultures' means")
    axis.grid(visible=True, axis="x", color="#e5e5e5", lw=0.6)
    return _png(figure)


def matrix_plot(matrix: Mapping[str, Any], metric: str) -> bytes:
    """Culture by expert: a good committee is bluest where they are the same (boxed). Colours are relative to each culture's own mean."""
    from matplotlib.patches import Rectangle  # type: ignore[import-not-found,unused-ignore]

    there = [at for at, row in enumerate(matrix["values"]) if None not in row]  # cultures with questions of this form
    values = np.array([matrix["values"][at] for at in there], dtype=np.float64)
    cultures = [matrix["cultures"][at] for at in there]
    gap = values - values.mean(axis=1, keepdims=True)
    high = max(float(np.abs(gap).max()), 1e-9)
    rows, columns = values.shape
    figure, axis = _figure(2.6 + 0.36 * columns, 2.4 + 0.3 * rows)
    image = axis.imshow(gap, cmap="RdBu", vmin=-high, vmax=high, aspect="auto")
    axis.set_xticks(range(columns), matrix["experts"], rotation=90, fontsize=7)
    axis.set_yticks(range(rows), cultures, fontsize=7)
    for row in range(rows):
        for column in range(columns):
            text = f"{values[row, column]:.2f}".removeprefix("0")
            ink = "#ffffff" if abs(gap[row, column]) > 0.6 * high else "#222222"
            own = matrix["experts"][column] == cultures[row]
            axis.text(
                column, row, text, ha="center", va="center", fontsize=5.5, color=ink, weight="bold" if own else None
            )
            if own:
                axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=1.2, ec="#222222"))
    axis.set_title(f"{metric} of every culture's answers with every expert", fontsize=9)
    axis.set_xlabel("expert")
    axis.set_ylabel("culture")
    figure.colorbar(image, ax=axis, label="less the culture's mean")
    return _png(figure)


def calibration_plot(lines: Mapping[str, Sequence[Mapping[str, float]]], across: str, up: str) -> bytes:
    """Reliability: on the diagonal, what is said comes true as often as it is said."""
    figure, axis = _figure(5.2, 4.4)
    axis.plot([0, 1], [0, 1], color=_GREY, lw=0.8, ls="--")
    for (name, bins), colour in zip(lines.items(), _hues(len(lines)), strict=True):
        axis.plot(
            [one["confidence"] for one in bins],
            [one["share"] for one in bins],
            marker="o",
            ms=4,
            lw=1.2,
            color=colour,
            label=name,
        )
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel=across, ylabel=up)
    axis.grid(visible=True, color="#e5e5e5", lw=0.6)
    axis.legend(fontsize=7, frameon=False)
    return _png(figure)


def curves_plot(curves: Sequence[Mapping[str, Any]], name: str) -> bytes:
    """One kind of curve, a line an expert."""
    lines = [(f"{one['committee']}: {one['expert']}", one["curves"][name]) for one in curves if name in one["curves"]]
    figure, axis = _figure(6.4, 3.6)
    for (label, points), colour in zip(lines, _hues(len(lines)), strict=True):
        axis.plot([x for x, _ in points], [y for _, y in points], lw=1, color=colour, label=label)
    axis.set(xlabel="step", ylabel=name)
    axis.grid(visible=True, color="#e5e5e5", lw=0.6)
    if len(lines) <= 12:
        axis.legend(fontsize=6, frameon=False)
    return _png(figure)


def _hues(count: int) -> list[str]:
    return [_HUES[index % len(_HUES)] for index in range(count)]


def _figure(wide: float, high: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    figure = Figure(figsize=(wide, high), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130, metadata={"Software": None})  # the same report, the same bytes
    return data.getvalue()
