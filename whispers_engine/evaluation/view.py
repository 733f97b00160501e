"""How parts of a report are shown: numbers, intervals, names of rows, the row that the others are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def reference_row(section: Mapping[str, Any]) -> str:
    """The row that others are compared with: the first committee's experts, else the base."""
    keys = [row["row"] for row in section["rows"]]
    return next((key for key in keys if key.endswith("/expert")), "base")


def gap_to(section: Mapping[str, Any], reference: str, row: str) -> Mapping[str, Any] | None:
    """The reference less a row, mean of the cultures' means; None for the reference itself."""
    for one in section["differences"]:
        if (one["a"], one["b"]) == (reference, row):
            return one["macro"]
        if (one["a"], one["b"]) == (row, reference):
            back = one["macro"]
            turned = {key: None if back[key] is None else -back[key] for key in ("mean", "low", "high")}
            return {"n": back["n"], "mean": turned["mean"], "low": turned["high"], "high": turned["low"]}
    return None


def full_label(row: Mapping[str, Any]) -> str:
    """With its committee's name, for where rows of several stand together."""
    return row["label"] if row["committee"] is None else f"{row['committee']}: {row['label']}"


def number(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}.3f}"


def with_interval(one: Mapping[str, Any] | None, signed: bool = False) -> str:
    if one is None or one["mean"] is None:
        return "–"
    if one["low"] is None:
        return number(one["mean"], signed)
    return f"{number(one['mean'], signed)} [{number(one['low'], signed)}, {number(one['high'], signed)}]"
