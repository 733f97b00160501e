"""One question with options to E experts: the engine against transformers called once per expert, as the paper's own code calls its model.

    python benchmarks/committee_vs_loop.py [--json FILE]

Both run in this process, float32, same weights, on the CPU, alternately; the engine's page cache is emptied before every round, so both
start cold. Before any time is taken the two must agree on every log-probability within 2e-4.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from whispers_engine import Committee, Engine
from whispers_engine.pull import pull

ROOT = Path(__file__).parents[1]
OPTIONS = ["Rice", "Bread", "Maize"]
ROUNDS = 5


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def loop(hf: Any, engine: Engine, experts: list[str], context: list[int], header: list[int]) -> list[list[float]]:
    """One forward per expert, all options after it as single tokens: the cheapest that transformers users can do per expert."""
    first = [engine.chat.option(option)[0] for option in OPTIONS]
    embed = hf.get_input_embeddings()
    rows = []
    for name in experts:
        parts = (embed(torch.tensor(context)), engine.expert(name).embeddings, embed(torch.tensor(header)))
        logits = hf(inputs_embeds=torch.cat(parts)[None], logits_to_keep=1).logits[0, -1]
        rows.append(logits.log_softmax(-1)[first].tolist())
    return rows


def ours(engine: Engine, experts: list[str], context: list[int], header: list[int]) -> list[list[float]]:
    engine.pool.forget()
    first = [engine.chat.option(option)[:1] for option in OPTIONS]
    rows: list[list[float]] = engine.score((context, header), first, experts=experts).logprobs.tolist()
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base = pull("smollm2-135m-instruct")
    engine = Engine(base, dtype="float32")
    for expert in Committee.load(ROOT / "examples" / "cultures").experts:
        engine.add_expert(
            replace(expert, placement="suffix")
        )  # which transformers' users can say with `inputs_embeds` alone
    hf = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    names = engine.experts
    words = (ROOT / "LICENSE").read_text().split()
    results = []
    for length in (100, 500):
        context, header = engine.chat.split(" ".join(words[: int(length * 0.72)]))
        for count in (1, 4, 20):
            asked = names[:count]
            got, want = ours(engine, asked, context, header), loop(hf, engine, asked, context, header)
            error = max(abs(a - b) for row, peer in zip(got, want, strict=True) for a, b in zip(row, peer, strict=True))
            if error > 2e-4:
                sys.exit(
                    f"the two differ by {error:.1e} for {count} experts over {len(context)} tokens: nothing is timed"
                )
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            runs = {
                "ours": partial(ours, engine, asked, context, header),
                "theirs": partial(loop, hf, engine, asked, context, header),
            }
            for _ in range(ROUNDS):
                for key, run in runs.items():
                    start = time.perf_counter()
                    run()
                    times[key].append((time.perf_counter() - start) * 1e3)
            mine, peer = statistics.median(times["ours"]), statistics.median(times["theirs"])
            results.append(
                {
                    "experts": count,
                    "context": len(context),
                    "dtype": "float32",
                    "ours_ms": round(mine, 1),
                    "peers": {"transformers-fp32": {"ms": round(peer, 1), "ratio": round(peer / mine, 2)}},
                }
            )
            print(
                f"{count:3} experts, {len(context):4} tokens: {mine:8.1f} ms, transformers {peer:8.1f} ms, ratio {peer / mine:.2f}"
            )
    if arguments.json:
        report = {
            "device": f"{processor()}, {torch.get_num_threads()} threads",
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "command": "python benchmarks/committee_vs_loop.py",
            "results": results,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
