"""`whispers bench kernels`: the sweep. Every shape is checked first; where ours is wrong, nothing of that shape is timed."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any, cast

import torch

from whispers_engine.errors import WhispersError

from .attention import HEADS, DecodeInputs, DecodeShape, parse_heads
from .check import PEER, Verdict
from .measure import (
    Call,
    Ceilings,
    Sampler,
    Timing,
    alternate,
    ceilings,
    copies,
    environment,
    first_line,
    free_memory,
    implementation,
    rounded,
    sampler,
)
from .peers import PEERS, Unavailable
from .small_ops import OpCase, Widths, calls, op_cases

EXPERTS = (1, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 2048, 8192, 32768)
# On a CPU the whole sweep would take an hour; it is a check of the code there, not a measurement that anybody asked for.
CPU_EXPERTS, CPU_CONTEXTS, CPU_HEADS = (1, 4, 8), (128, 512), ("llama-1b",)
_MEMORY_SHARE = 0.6  # of what is free, for one peer's inputs: its workspace and the exact result want some too

Report = dict[str, Any]
Progress = Callable[[str, int, int], None]  # what is measured next, how many are done, of how many


def run_kernels(
    device: torch.device,
    dtype: torch.dtype,
    command: str,
    *,
    impl: str = "auto",
    experts: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    heads: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    ops: bool = True,
    seconds: float | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Measures decode attention and the small operations, and returns the report that `--json` prints.

    Args:
        impl: "auto" or a name; the interpreter is refused, since its times mean nothing.
        experts, contexts, heads: the sweep; None: the default for the device.
        peers: names of `PEERS`; None: all that run here.
        ops: the small operations too.
        seconds: no new shape is begun after so many; what was left out is named.

    Raises:
        WhispersError: an implementation, heads or a peer that is not there, or sizes below 1.
    """
    impl = implementation(impl, device)
    small = device.type != "cuda"
    experts = experts or (CPU_EXPERTS if small else EXPERTS)
    contexts = contexts or (CPU_CONTEXTS if small else CONTEXTS)
    if min(*experts, *contexts) < 1:
        raise WhispersError(f"--experts {list(experts)}, --context {list(contexts)}; accepted: integers from 1 on")
    shapes = [
        DecodeShape(name, parse_heads(name), e, s, dtype)
        for name, e, s in product(heads or (CPU_HEADS if small else HEADS), experts, contexts)
    ]
    unknown = [name for name in peers or () if name not in PEERS]
    if unknown:
        raise WhispersError(f"--peers: {', '.join(unknown)}; accepted: {', '.join(PEERS)}")

    start = time.monotonic()
    progress("ceilings", 0, len(shapes))
    top = ceilings(device, dtype)
    report: Report = {
        **environment(device, command),
        "impl": impl,
        "ceilings": {"GB_s": top.GB_s, "GFLOP_s": top.GFLOP_s},
        "results": [],
        "left_out": [],
    }
    work: list[tuple[str, Callable[[], Report]]] = [
        (
            f"attention, {shape.name}, {shape.experts} experts, {shape.context} keys",
            partial(measure_attention, shape, device, impl, top, PEERS if peers is None else peers),
        )
        for shape in shapes
    ]
    if ops:
        widths = Widths(256, 688, 4096, 8, 4, 32, dtype) if small else Widths(4096, 14336, 128256, 32, 8, 128, dtype)
        cases = op_cases(widths, (8, 64) if small else (8, 64, 2048))
        work += [(f"{case.op}, {case.shape}", partial(measure_op, case, device, impl, top)) for case in cases]
    for done, (what, measure) in enumerate(work):
        if seconds is not None and time.monotonic() - start > seconds:
            report["left_out"].append(what)
            continue
        progress(what, done, len(work))
        report["results"].append(measure())
        gc.collect()  # graphs and inputs hold memory
    report["crossover"] = crossovers(report["results"])
    report["ok"] = all(result["ok"] for result in report["results"])
    return cast(Report, rounded(report))


def measure_attention(
    shape: DecodeShape, device: torch.device, impl: str, top: Ceilings, peers: Iterable[str]
) -> Report:
    """One shape: ours and every peer that can run and is right, on the same keys."""
    inputs = DecodeInputs(shape, device)
    mine = inputs.ours(impl)
    result: Report = {
        "op": "committee_attention",
        "experts": shape.experts,
        "context": shape.context,
        "heads": shape.name,
        "dtype": str(shape.dtype).removeprefix("torch."),
        **_judged(lambda: inputs.judge(mine[0]())),
    }
    if not result["ok"]:
        return result
    samplers = {"ours": sampler(mine, device)}
    left_out: dict[str, str] = {}
    for name in peers:
        wanted = PEERS[name].bytes(shape)
        wanted *= copies(wanted, device)
        if wanted > _MEMORY_SHARE * free_memory(device):
            left_out[name] = f"needs {wanted / 1e9:.1f} GB"
            continue
        try:
            theirs = PEERS[name].build(inputs)
            verdict = inputs.judge(theirs[0]().reshape(inputs.exact.shape), PEER)
            if not verdict.ok:
                left_out[name] = f"wrong: error {verdict.error:.1e}, budget {verdict.budget:.1e}"
                continue
            samplers[name] = sampler(theirs, device)
        except Unavailable as error:
            left_out[name] = str(error)
        except Exception as error:  # a peer's failure is its own, whatever it raises
            left_out[name] = first_line(error)
    times = alternate(samplers)
    result |= _judged(
        lambda: inputs.judge(mine[-1]())
    )  # once more: what thousands of launches leave behind must not show
    return result | _figures(times, top, shape.bytes, shape.flops) | {"left_out": left_out} if result["ok"] else result


def measure_op(case: OpCase, device: torch.device, impl: str, top: Ceilings) -> Report:
    """One small operation at one shape, beside its formula."""
    sets = case.sets(device)
    mine = partial(case.ours, impl=impl)
    result: Report = {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        **_judged(lambda: case.judge(mine, sets[0])),
    }
    if not result["ok"]:
        return result
    samplers: dict[str, Sampler] = {
        "ours": sampler(calls(mine, sets), device),
        "torch-eager": sampler(calls(case.plain, sets), device),
    }
    left_out: dict[str, str] = {}
    if device.type == "cuda":
        try:
            torch.compiler.reset()
            compiled: Callable[..., Any] = torch.compile(case.plain, dynamic=False)
            theirs: list[Call] = calls(compiled, sets)
            theirs[0]()
            samplers["torch-compile"] = sampler(theirs, device)
        except Exception as error:
            left_out["torch-compile"] = first_line(error)
    times = alternate(samplers)
    result |= _judged(lambda: case.judge(mine, sets[0]))
    return result | _figures(times, top, case.bytes, 0) | {"left_out": left_out} if result["ok"] else result


def _judged(run: Callable[[], Verdict]) -> Report:
    """Ours is red where it is wrong, and where it fails; the other shapes are measured all the same."""
    try:
        verdict = run()
    except Exception as error:
        return {"ok": False, "failure": first_line(error)}
    found = verdict.error if math.isfinite(verdict.error) else None  # JSON has no NaN
    return {"ok": verdict.ok, "error": found, "budget": verdict.budget}


def _figures(times: dict[str, Timing], top: Ceilings, moved: int, flops: int) -> Report:
    """What the times mean: rates of the necessary work, the floor's share, and each peer's time over ours."""
    ours = times["ours"]
    floor = top.floor_ms(moved, flops)
    return {
        "ours_ms": ours.ms,
        "spread": ours.spread,
        "how": ours.how,
        "peers": {
            name: {"ms": time.ms, "ratio": time.ms / ours.ms, "spread": time.spread, "how": time.how}
            for name, time in times.items()
            if name != "ours"
        },
        "bytes": moved,
        "flops": flops,
        "GB_s": moved / ours.ms * 1e-6,
        "TFLOP_s": flops / ours.ms * 1e-9,
        "floor_ms": floor,
        "floor_share": floor / ours.ms,
        "limit": top.limit(moved, flops),
    }


def crossovers(results: Iterable[Report]) -> list[Report]:
    """For every heads and number of experts: the shortest context from which on no peer is faster; None where there is none."""
    groups: dict[tuple[str, int], list[Report]] = {}
    for result in results:
        if result["op"] == "committee_attention":
            groups.setdefault((result["heads"], result["experts"]), []).append(result)
    found = []
    for (heads, experts), group in groups.items():
        crossover = None
        for result in sorted(group, key=lambda result: -result["context"]):
            ratios = [peer["ratio"] for peer in result.get("peers", {}).values()]
            if not ratios or min(ratios) < 1:
                break
            crossover = result["context"]
        found.append({"heads": heads, "experts": experts, "context": crossover})
    return found
