"""Verifies and measures everything on the GPU that it finds, in under ten minutes, and writes one JSON to `benchmarks/results/`.

    python benchmarks/gpu_suite.py                 no arguments needed, nor the project installed
    python benchmarks/gpu_suite.py --list-targets  what it is measured against

Each stage is a process of its own with a share of the time; what the stages before one left over, it may use. Checks run side by side: they
time nothing. The file is written anew after every stage, so that whatever ends the suite early costs what was not measured yet and no more.
Where a check is red, nothing is timed.
Without a GPU it says so, lists the targets as not measured, writes nothing and exits with 2; with 1 where a check is red.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from whispers_engine.bench.targets import NOT_MEASURED, verdicts  # noqa: E402
from whispers_engine.files import write_json  # noqa: E402

BUDGET = 570.0  # seconds for all stages, if nothing else is asked: ten minutes, less what starting and ending take
WHISPERS = ("-m", "whispers_engine.cli.main")
CUDA = ("--device", "cuda", "--json")
VERIFY = (*WHISPERS, "verify", "--impl", "triton", *CUDA)
SWEEP = ("bench", "kernels", "--impl", "triton", *CUDA)
STEPS = ("bench", "throughput", "--impl", "triton", *CUDA)
FLEX_SHAPES = ("--heads", "llama-8b", "--experts", "8,64")
UNCOMPILED = ("--peers", "transformers,transformers-static")
# Every check is of one dtype, and each dtype has a process of its own: what takes long is compiling.
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Stage:
    """One process. `kind` says what its output counts for; a check that is not green ends the suite."""

    name: str
    kind: str  # check, tests, kernels or throughput
    arguments: tuple[str, ...]
    seconds: float  # its own share; what is left over from before comes on top
    paced: bool = False  # takes --seconds, and then ends by itself with what it has


# Compiling is most of what tests do on a GPU. Left out: the gates, which compile for other chips, and what does not run on the GPU.
WORKERS = ("-n", "8") if importlib.util.find_spec("xdist") else ()
TESTS = (
    "tests/kernels",
    "tests/engine/test_decode.py",
    "tests/engine/test_cuda.py",
    "--ignore=tests/kernels/test_aot.py",
    "-k=triton or cuda or decode",
)

# In the order of what would be missed most. FlexAttention compiles for every shape, so it has a stage of its own, with whatever is left.
STAGES = (
    *(Stage(f"verify {dtype}", "check", (*VERIFY, "--only", f", {dtype}"), 220) for dtype in DTYPES),
    Stage("tests", "tests", ("-m", "pytest", "-o", "addopts=", "-q", *WORKERS, *TESTS), 220),
    Stage("throughput 8b", "throughput", (*WHISPERS, *STEPS, "--shape", "llama-8b", *UNCOMPILED), 80),
    Stage("kernels", "kernels", (*WHISPERS, *SWEEP, "--peers", "sdpa-repeated,flashinfer-cascade,flash-attn"), 110, True),
    Stage("throughput 1b", "throughput", (*WHISPERS, *STEPS, "--shape", "llama-1b", *UNCOMPILED), 40),
    Stage("kernels flex", "kernels", (*WHISPERS, *SWEEP, "--no-ops", "--peers", "flex", *FLEX_SHAPES), 40, True),
    Stage("throughput 8b compiled", "throughput", (*WHISPERS, *STEPS, "--shape", "llama-8b", "--peers", "transformers-compiled"), 30),
)  # fmt: skip


def run(stage: Stage, seconds: float) -> dict[str, Any]:
    """Runs a stage: its command, exit status, seconds, and what it printed as JSON, or the end of what it printed otherwise."""
    arguments = [*stage.arguments, *(("--seconds", f"{seconds - 25:.0f}") if stage.paced else ())]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TRITON_INTERPRET", None)  # the kernels themselves
    done: dict[str, Any] = {"stage": stage.name, "command": shlex.join(["python", *arguments])}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its compilers end with it
    )
    try:
        printed, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        printed, errors = process.communicate()
        done["failure"] = f"not finished in {seconds:.0f} s"
    done |= {"exit": process.returncode, "seconds": round(time.monotonic() - start, 1)}
    try:
        done["report"] = json.loads(printed)
    except ValueError:
        done["output"] = (printed + errors)[-4000:]
    return done


def red(stage: Stage, done: dict[str, Any]) -> bool:
    """Whether a check has failed, or was not finished. Tests that could not start have neither passed nor failed."""
    if stage.kind == "check":
        return done["exit"] != 0 or not done.get("report", {}).get("ok", False)
    return stage.kind == "tests" and done.get("exit") == 1


def timed(stages: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The reports of the measuring stages of a kind. Shapes that were red are in them without a time."""
    kinds = {stage.name: stage.kind for stage in STAGES}
    return [done["report"] for done in stages if kinds[done["stage"]] == kind and "report" in done]


def suite(folder: Path, budget: float) -> int:
    import torch

    from whispers_engine.bench.measure import environment

    start = time.monotonic()
    device = torch.device("cuda")
    about = environment(device, "python benchmarks/gpu_suite.py")
    about["driver"] = driver()
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = folder / f"gpu-{slug}.json"
    checks = [stage for stage in STAGES if stage.kind in ("check", "tests")]
    print(
        f"{', '.join(stage.name for stage in checks)}: at most {max(s.seconds for s in checks):.0f} s",
        file=sys.stderr,
        flush=True,
    )
    with ThreadPoolExecutor() as side_by_side:
        stages = list(side_by_side.map(run_check, checks))
    stop = any(map(red, checks, stages))

    def write(complete: bool) -> tuple[bool, list[dict[str, Any]]]:
        """What is known so far; whether all of it is well, and the targets."""
        targets = verdicts(timed(stages, "kernels"), timed(stages, "throughput"))
        ok = not stop and all(done.get("exit", 0) == 0 for done in stages)
        write_json(path, {**about, "ok": ok, "complete": complete, "targets": targets, "stages": stages})
        return ok, targets

    ok, targets = write(complete=False)
    for index, stage in enumerate(STAGES[len(checks) :], start=len(checks)):
        left = budget - (time.monotonic() - start)
        spare = left - sum(later.seconds for later in STAGES[index:])
        seconds = min(left, stage.seconds + max(0.0, spare))
        if stop or seconds < 30:
            stages.append({"stage": stage.name, "failure": "a check is red" if stop else "no time left"})
        else:
            print(f"{stage.name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
            stages.append(run(stage, seconds))
        ok, targets = write(complete=stage is STAGES[-1])
    for done in stages:
        print(f"{done['stage']}: {done.get('failure') or 'exit status ' + str(done['exit'])}", file=sys.stderr)
    show(targets)
    print(f"written: {path}")
    return 0 if ok else 1


def run_check(stage: Stage) -> dict[str, Any]:
    """Runs a stage that times nothing, unless what it needs is not installed."""
    if stage.kind == "tests" and not all(map(importlib.util.find_spec, ("pytest", "hypothesis"))):
        return {"stage": stage.name, "failure": "pytest or hypothesis is not installed"}
    return run(stage, stage.seconds)


def driver() -> str | None:
    """The driver's version, as its own tool tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.strip().split("\n")[0] or None


def show(targets: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="targets on one H100", title_justify="left")
    for column in ("target", "threshold", "measured", "verdict", "where"):
        table.add_column(column, overflow="fold")
    for row in targets:
        measured = "" if row["measured"] is None else f"{row['measured']:.3g}"
        threshold = f"{row['sense']} {row['threshold']:g}"
        table.add_row(row["target"], threshold, measured, row["verdict"], row.get("where", ""))
    Console(markup=False, highlight=False).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--list-targets", action="store_true", help="print the targets and measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for everything; what does not fit is left out")
    arguments = parser.parse_args()
    if arguments.list_targets:
        show(verdicts([], []))
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"no GPU here: every target is {NOT_MEASURED}, nothing is written", file=sys.stderr)
        show(verdicts([], []))
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    return suite(arguments.out, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
