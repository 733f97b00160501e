"""Training curves, as experts' records have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Curve = list[list[float]]  # points of a step and a value


def curves_of(record: Mapping[str, Any]) -> dict[str, Curve]:
    """The curves of a training record: entries called "curve" or "..._curve", lists of {"step": ..., and values by name}.

    Returns:
        A curve a name of a value ("train", "dev"; "shared train" of a "shared_curve"). Values that are missing and whatever is no curve
        are left out.
    """
    curves: dict[str, Curve] = {}
    for key, points in record.items():
        kind = key.removesuffix("curve")
        if kind == key or (kind and not kind.endswith("_")) or not isinstance(points, list):
            continue
        for point in points:
            if not isinstance(point, Mapping) or not _number(point.get("step")):
                continue
            for name, value in point.items():
                if name != "step" and _number(value):
                    label = f"{kind.replace('_', ' ')}{name}"
                    curves.setdefault(label, []).append([float(point["step"]), float(value)])
    return curves


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
