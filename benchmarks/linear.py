"""Packed linears beside what else multiplies on a CPU: all linears of a decoder's layers, distinct weights each, so that none is cached.

    python benchmarks/linear.py [--rows 1,8,32] [--rounds 20] [--dtype bfloat16] [--json]

Per number of rows: the sum over the linears of each one's fastest call, in turn with the peers'. oneDNN gets weights that it has reordered
for that number of rows; `aten-int8` is torch's product with int8 weights alone. GB/s and GFLOP/s are ours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from whispers_kernels.cpp import isa, num_threads
from whispers_kernels.cpp.linear import PackedLinear
from whispers_kernels.cpp.packing import quantize
from whispers_kernels.memory import Memory

SHAPES = (
    (960, 576),
    (576, 576),
    (3072, 576),
    (576, 1536),
)  # outputs and inputs of SmolLM2-135M: qkv, out, gate and up, down
LAYERS = 30
Call = Callable[[Tensor], Tensor]


def onednn(weight: Tensor, rows: int) -> Call:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def aten_int8(weight: Tensor) -> Call:
    numbers, scale = quantize(weight)
    scale = scale.to(weight.dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, numbers, scale)


def torch_linear(weight: Tensor) -> Call:
    return lambda x: F.linear(x, weight)


def seconds(sweeps: dict[str, list[Call]], inputs: list[Tensor], rounds: int) -> dict[str, float]:
    """The sum of each call's fastest round."""
    fastest = {name: [float("inf")] * len(calls) for name, calls in sweeps.items()}
    for _ in range(rounds):
        for name, calls in sweeps.items():
            for index, call in enumerate(calls):
                begin = time.perf_counter()
                call(inputs[index])
                fastest[name][index] = min(fastest[name][index], time.perf_counter() - begin)
    return {name: sum(times) for name, times in fastest.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16,24,32,64,128,512")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES * LAYERS
    weights = [torch.randn(shape, generator=generator).mul_(0.05).to(dtype) for shape in shapes]
    memory = Memory()
    sweeps: dict[str, list[Call]] = {
        "ours": [PackedLinear(weight, memory=memory) for weight in weights],
        "ours-int8": [PackedLinear(weight, quantization="int8", memory=memory) for weight in weights],
        "torch": [torch_linear(weight) for weight in weights],
    }
    if dtype == torch.bfloat16:
        sweeps["aten-int8"] = [aten_int8(weight) for weight in weights]
    numbers, size = sum(weight.numel() for weight in weights), sum(weight.nbytes for weight in weights)
    results = []
    for rows in map(int, options.rows.split(",")):
        sweeps["onednn"] = [onednn(weight, rows) for weight in weights]
        inputs = [torch.randn(rows, shape[1], generator=generator).to(dtype) for shape in shapes]
        with torch.inference_mode():
            took = seconds(sweeps, inputs, options.rounds)
        ours, result = took["ours"], {"rows": rows, "ms": {name: 1e3 * value for name, value in took.items()}}
        result |= {"GB_s": size / ours / 1e9, "GFLOP_s": 2 * numbers * rows / ours / 1e9}
        result["ratio"] = {name: took[name] / ours for name in ("onednn", "torch")}
        if "aten-int8" in took:
            result["ratio"]["aten-int8 over ours-int8"] = took["aten-int8"] / took["ours-int8"]
        results.append(result)
        if not options.json:
            times = "  ".join(f"{name} {value:.2f}" for name, value in result["ms"].items())
            ratios = "  ".join(f"{name} {value:.2f}" for name, value in result["ratio"].items())
            print(
                f"{rows:4} rows, ms: {times} | {result['GB_s']:.0f} GB/s, {result['GFLOP_s']:.0f} GFLOP/s | {ratios}",
                flush=True,
            )
    if options.json:
        print(json.dumps({"isa": isa(), "threads": num_threads(), "dtype": options.dtype, "results": results}))


if __name__ == "__main__":
    main()
