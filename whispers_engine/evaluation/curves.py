"""Training curves, as experts' records have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Curve = list[list[float]]  # points of a step and a value


def curves_of(record: Mapping[str, Any]) -> dict[str, Curve]:
    """The curves under a record's "curves": a mapping from names to lists of values, or of [step, value]. What is no curve is left out.

    A list named "step" or "steps" gives the steps of the lists of values that are as long.
    """
    found = record.get("curves")
    if not isinstance(found, Mapping):
        return {}
    steps: list[float] = next((found[key] for key in ("step", "steps") if _numbers(found.get(key))), [])
    curves: dict[str, Curve] = {}
    for name, values in found.items():
        if name in ("step", "steps") or not isinstance(values, list) or not values:
            continue
        if _numbers(values):
            at = steps if len(steps) == len(values) else range(1, len(values) + 1)
            curves[str(name)] = [[float(x), float(y)] for x, y in zip(at, values, strict=True)]
        elif all(_numbers(point) and len(point) == 2 for point in values):
            curves[str(name)] = [[float(x), float(y)] for x, y in values]
    return curves


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
