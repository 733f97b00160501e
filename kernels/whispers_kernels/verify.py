"""Every operation against float64 on this machine: what `whispers verify` runs.

An error is the largest absolute one and a budget is in the same unit. Where budgets differ from entry to entry, both are those of the
entry that comes nearest to its budget, or exceeds it most. How budgets are made is told in `verify_checks`.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import verify_checks as checks_of
from .ops import POOL_RULES, check_impl
from .verify_cases import attention_cases
from .verify_checks import Part, Parts, Run

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Result:
    """One line of the table. Without an error in numbers (`nan`), `note` says what is wrong."""

    op: str
    impl: str
    dtype: str
    case: str
    error: float
    budget: float
    ok: bool
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: None."""
        numbers = {"error": self.error, "budget": self.budget}
        return {
            **vars(self),
            **{name: number if math.isfinite(number) else None for name, number in numbers.items()},
        }


@dataclass(frozen=True)
class Check:
    """One case of one operation in one dtype."""

    op: str
    impl: str
    dtype: str
    case: str
    compare: Callable[[], Parts]

    @property
    def name(self) -> str:
        return f"{self.op}, {self.dtype}, {self.case}"

    def run(self) -> Iterator[Result]:
        """Never raises: what a kernel raises is the check's result."""
        try:
            for more, parts in self.compare():
                error, budget, note = judge(parts)
                case = f"{self.case}: {more}" if more else self.case
                yield Result(self.op, self.impl, self.dtype, case, error, budget, error <= budget and not note, note)
        except Exception as error:
            yield Result(self.op, self.impl, self.dtype, self.case, math.nan, math.nan, False, _first_line(error))


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # Triton's interpreter wraps the error, each time it is raised
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def judge(parts: list[Part]) -> tuple[float, float, str]:
    """Error and budget of the entry that uses most of its budget; and what is wrong beside numbers, or ""."""
    worst, note = (-1.0, 0.0, 0.0), ""
    for actual, exact, budget in parts:
        if actual.shape != exact.shape:
            return math.nan, math.nan, f"the shape is {list(actual.shape)}, not {list(exact.shape)}"
        found, wanted = actual.cpu().double(), exact.cpu().double()
        # -inf is right where a row sees nothing, and nowhere else; NaN is right nowhere.
        strange = ~found.isfinite() & (found != wanted)
        if bool(strange.any()):
            note = f"{int(strange.sum())} of {found.numel()} entries are NaN or infinite"
        error = torch.where(found == wanted, 0.0, (found - wanted).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        allowed = torch.as_tensor(budget, dtype=torch.float64).expand(error.shape).nan_to_num(nan=0.0, posinf=0.0)
        share = torch.where(error > 0, error / allowed, 0.0)
        if share.numel() > 0:
            at = int(share.argmax())
            worst = max(worst, (float(share.flatten()[at]), float(error.flatten()[at]), float(allowed.flatten()[at])))
    return worst[1], worst[2], note


def is_interpreted(impl: str, device: torch.device) -> bool:
    """Triton on the CPU is its interpreter: slow, and not exact in bfloat16 and fp8."""
    return impl == "triton" and device.type == "cpu"


def _holds_far_pages(device: torch.device) -> bool:
    """Keys and values of 2^31 fp8 entries each, and their scales, take 4.5 GB."""
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 6 * 10**9


def _has_fp8(impl: str, device: torch.device) -> bool:
    """Triton converts e4m3 on NVIDIA's GPUs since Ada."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return impl != "triton" or not nvidia or torch.cuda.get_device_capability(device) >= (8, 9)


def left_out(impl: str, device: torch.device) -> list[str]:
    """What is not checked here, and why, a line each."""
    lines = []
    if is_interpreted(impl, device):
        lines += [
            "bfloat16: Triton's interpreter cuts digits off where a GPU rounds",
            "rope_and_store into fp8 pages: likewise",
            "more than 8 branches or 700 keys, and pools of large vocabularies: an interpreter is slow",
        ]
    if not _has_fp8(impl, device):
        lines.append("fp8 pages: Triton has them from compute capability 8.9 on")
    elif device.type == "cuda" and not _holds_far_pages(device):
        lines.append("pages beyond 2^31 entries: less than 6 GB are free on the device")
    return lines


def checks(impl: str, device: torch.device) -> list[Check]:
    """All checks of an implementation, "auto" being what it stands for on the device.

    Raises:
        ValueError: an implementation that is not here.
    """
    impl = check_impl(impl, device)
    interpreted, far = is_interpreted(impl, device), _holds_far_pages(device)
    quantised = (False, True) if _has_fp8(impl, device) else (False,)
    found: list[Check] = []

    def add(
        op: str, dtype: torch.dtype, case: str, compare: Callable[..., Parts], *args: Any, fp8: bool = False
    ) -> None:
        named = str(dtype).removeprefix("torch.") + (" fp8" if fp8 else "")
        found.append(Check(op, impl, named, case, partial(compare, Run(impl, device, dtype), *args)))

    for dtype in FLOATS:
        if interpreted and dtype == torch.bfloat16:
            continue
        for case in attention_cases(interpreted, far):
            if case.fp8 in quantised:
                add("committee_attention", dtype, str(case), checks_of.attention, case, fp8=case.fp8)
        for ids, vocabulary, hidden, soft in _EMBEDDINGS:
            name = f"{_rows(len(ids))} of [{vocabulary}, {hidden}] and {soft} of soft prompts"
            add("embed_rows", dtype, name, checks_of.embedding, ids, vocabulary, hidden, soft)
        for shape in _NORMS:
            add("rms_norm", dtype, f"{list(shape)}", checks_of.norm, shape, False)
            add("add_rms_norm", dtype, f"{list(shape)}", checks_of.norm, shape, True)
        for rows, width in _GATES:
            add("silu_mul", dtype, f"[{rows}, 2 * {width}]", checks_of.gated, rows, width)
        for vocabulary, sizes in _POOLS[interpreted:]:
            for rule in POOL_RULES:
                name = f"{rule}, groups of {', '.join(map(str, sizes))}, vocabulary {vocabulary}"
                add("pool_logits", dtype, name, checks_of.pooling, vocabulary, sizes, rule)
        for positions, heads, kv_heads, dim, page_size in _ROPES:
            name = f"{_rows(len(positions))}, {heads} and {kv_heads} heads, D {dim}, pages of {page_size}"
            for fp8 in (False,) if interpreted else quantised:
                args = (positions, heads, kv_heads, dim, page_size, fp8)
                add("rope_and_store", dtype, name, checks_of.rope, *args, fp8=fp8)
    return found


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


# Odd sizes, one row, and what a model has. An id counts modulo the rows there are: -1 is the last soft prompt's. The first of the pools is
# too large for an interpreter.
_EMBEDDINGS: tuple[tuple[list[int], int, int, int], ...] = (
    ([0, 1, -1, 500, 0, -2], 999, 130, 3),
    ([-1], 70001, 64, 0),
    ([7, -1], 70001, 64, 1),
    ([], 9, 8, 2),
)
_NORMS = ((1, 1), (5, 33), (2, 3, 130), (1, 4096), (37, 2048), (3, 9000))
_GATES = ((1, 1), (5, 129), (37, 4864))
_POOLS = ((70001, (1, 3, 2)), (1, (2, 1)), (257, (8,)))
_ROPES = (
    ([0, 1, -1, -17, 3000, -4000, 12, 5], 32, 8, 128, 64),
    ([131071], 3, 1, 80, 16),
    (list(range(-5, 30)), 4, 4, 64, 7),
    ([2, 1, 0], 16, 1, 256, 128),
    ([9, 8], 9, 3, 96, 1),
)


def describe(device: torch.device) -> str:
    """The device, by the name that its maker gave it."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {platform.processor() or platform.machine()}"


def versions() -> dict[str, str | None]:
    """Of everything that a result depends on; None: not there."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = None
    return {**found, "cuda": torch.version.cuda, "hip": torch.version.hip, "system": platform.platform()}
