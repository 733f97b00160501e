"""Times, and the machine's two ceilings: what memory gives a second, what a matrix product computes a second.

On a GPU a contender's launches are captured into one CUDA graph where that can be done, and its replays are timed with events, so that
neither Python nor gaps between launches are in the numbers. Its inputs exist in several copies, used in turn, that together exceed
the L2 cache several times: in a model, a layer's keys are read once a step and never found there.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whispers_engine.errors import WhispersError
from whispers_kernels.ops import check_impl

Call = Callable[[], Any]

ROUNDS = 7
_SAMPLE_MS = {"cuda": 4.0, "cpu": 20.0}  # one sample lasts about this long: clocks and launch costs vanish in it
_SPAN_AT_MOST = 512 << 20
_SPAN_CPU = 64 << 20
_COPIES_AT_MOST = 512
_NODES_AT_MOST = 4096  # launches in a graph
_CEILING_SIZES = {"cuda": (1 << 30, 8192), "cpu": (1 << 28, 2048)}  # bytes copied; rows and columns of the product
_PACKAGES = (
    "whispers-engine",
    "triton",
    "transformers",
    "flashinfer-python",
    "flash-attn",
    "flash-attn-3",
    "llama-cpp-python",
)


class Sampler(NamedTuple):
    """Runs some calls and returns the milliseconds a call took."""

    sample: Callable[[], float]
    how: str  # "graph" (replays of a CUDA graph), "launches" (what cannot be captured) or "clock" (on the CPU)


class Timing(NamedTuple):
    """Milliseconds a call: the median of the rounds, and their interquartile range (of three or fewer, the range) over it. Less than
    that is noise."""

    ms: float
    spread: float
    how: str


class Ceilings(NamedTuple):
    """What this machine reaches on nothing else to do."""

    GB_s: float  # copy, bytes read plus bytes written; on a CPU a sum's bytes read where that is more: steps read, and hardly write
    GFLOP_s: float  # square matrix product of random numbers

    def floor_ms(self, bytes_moved: float, flops: float = 0.0) -> float:
        """No computation that moves so many bytes and needs so many operations runs faster."""
        return max(bytes_moved / self.GB_s, flops / self.GFLOP_s) * 1e-6

    def limit(self, bytes_moved: float, flops: float) -> str:
        """Which of the two holds it back."""
        return "matrix" if flops / self.GFLOP_s > bytes_moved / self.GB_s else "bandwidth"


def implementation(impl: str, device: torch.device) -> str:
    """The implementation that a name stands for. Raises WhispersError for one that is not here, and for the interpreter of Triton."""
    try:
        name = check_impl(impl, device)
    except ValueError as error:
        raise WhispersError(str(error)) from error
    if name == "triton" and device.type != "cuda":
        raise WhispersError(f"--impl {impl}: interpreted kernels are checked, never timed; accepted on a CPU: another")
    return name


def alternate(samplers: Mapping[str, Sampler], rounds: int = ROUNDS) -> dict[str, Timing]:
    """Samples everybody in turn, `rounds` times: a drift of the clocks meets all alike."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            samples[name].append(sampler.sample())
    return {name: summary(values, samplers[name].how) for name, values in samples.items()}


def summary(values: Sequence[float], how: str) -> Timing:
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 3 else (min(values), median, max(values))
    return Timing(median, (high - low) / median, how)


def copies(bytes_each: int, device: torch.device) -> int:
    """How many sets of inputs of this size to use in turn."""
    span = _SPAN_CPU
    if device.type == "cuda":
        span = min(_SPAN_AT_MOST, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return max(1, min(_COPIES_AT_MOST, math.ceil(span / max(1, bytes_each))))


def sampler(calls: Sequence[Call], device: torch.device) -> Sampler:
    """Warms up and returns what times these calls, taken in turn. Each call runs the same work on its own inputs."""
    return _cuda_sampler(calls, device) if device.type == "cuda" else _cpu_sampler(calls)


def _cpu_sampler(calls: Sequence[Call]) -> Sampler:
    calls[0]()
    start = time.perf_counter()
    calls[-1]()
    once = (time.perf_counter() - start) * 1e3
    number = max(1, min(10_000, int(_SAMPLE_MS["cpu"] / max(once, 1e-3))))
    turn = itertools.cycle(calls)

    def sample() -> float:
        start = time.perf_counter()
        for call in itertools.islice(turn, number):
            call()
        return (time.perf_counter() - start) * 1e3 / number

    return Sampler(sample, "clock")


def _cuda_sampler(calls: Sequence[Call], device: torch.device) -> Sampler:
    with torch.cuda.device(device):
        # Capture wants a warm-up on another stream than the default one.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in [*calls[:2], calls[-1]]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        run, how = launches(calls, 1)
        run()
        wanted = math.ceil(_SAMPLE_MS["cuda"] / max(_between_events(run), 1e-3))
        passes = max(1, min(wanted, _NODES_AT_MOST // len(calls)))
        if passes > 1:
            run, how = launches(calls, passes)
            run()
        torch.cuda.synchronize()
        return Sampler(lambda: _between_events(run) / (passes * len(calls)), how)


def launches(calls: Sequence[Call], passes: int) -> tuple[Call, str]:
    """All the calls, so many times: the replay of one graph, or plain launches where something in them cannot be captured."""

    def launch() -> None:
        for _ in range(passes):
            for call in calls:
                call()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            launch()
    except RuntimeError:
        torch.cuda.synchronize()
        return launch, "launches"
    return graph.replay, "graph"


def _between_events(run: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures both, once a run: datasheets promise more than any kernel gets."""
    copied, size = _CEILING_SIZES[device.type]
    source = _huge(copied) if device.type == "cpu" else torch.empty(copied, dtype=torch.uint8, device=device)
    source.random_(255)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    samplers = {
        "copy": sampler([lambda: target.copy_(source)], device),
        "matmul": sampler([lambda: torch.mm(left, right, out=product)], device),
    }
    if device.type == "cpu":
        samplers["read"] = sampler([source.view(torch.int64).sum], device)
    times = alternate(samplers)
    rates = [2 * source.nbytes / times["copy"].ms * 1e-6]
    rates += [source.nbytes / times["read"].ms * 1e-6] if "read" in times else []
    return Ceilings(max(rates), 2.0 * size**3 / times["matmul"].ms * 1e-6)


def _huge(size: int) -> Tensor:
    """uint8 `[size]` in huge pages where the system grants them, as packed weights lie: from small ones a sum is 8 % slower."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had now. On a GPU, what PyTorch caches is given back first."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def rounded(value: Any) -> Any:
    """A report with five digits in every number: more are noise in a file that people compare."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def first_line(error: Exception) -> str:
    """What a report keeps of an exception: tracebacks belong to no table."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:200]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # not installed, or run from a checkout
        return None


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """What a number has to be read with: `device`, `versions`, `command`."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {package: version for package in _PACKAGES if (version := _version(package))}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions["cuda"] = str(torch.version.cuda)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return {"device": name, "versions": versions, "command": command}


def _processor() -> str:
    """Its name, and family and model: virtual machines call very different ones alike ("AMD EPYC")."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.is_file() else []
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"
