"""One question with options to E experts: the engine beside transformers, called once per expert as the paper's own code calls its model,
and as its best users would: the context once, its cache repeated, all experts' soft prompts as one batch.

    python benchmarks/committee_vs_loop.py [--json FILE]

All run in this process, float32, same weights, on the CPU, in turn, and each begins with nothing cached in every round. Before any time is
taken they must agree on every log-probability within 2e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from whispers_engine import Committee, Engine
from whispers_engine.bench.contest import OURS, compare, in_turn
from whispers_engine.bench.hf import Transformers
from whispers_engine.bench.measure import environment, rounded
from whispers_engine.bench.steps import Prompt
from whispers_engine.pull import pull

ROOT = Path(__file__).parents[1]
OPTIONS = ["Rice", "Bread", "Maize"]
ROUNDS = 5
TOLERANCE = 2e-4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base = pull("smollm2-135m-instruct")
    engine = Engine(base, dtype="float32")
    for expert in Committee.load(ROOT / "examples" / "cultures").experts:
        # `suffix`, which transformers' users can say with `inputs_embeds` alone.
        engine.add_expert(replace(expert, placement="suffix"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    words = (ROOT / "LICENSE").read_text().split()
    results = []
    for length in (100, 500):
        question = " ".join(words[: int(length * 0.72)])
        for count in (1, 4, 20):
            results.append(measure(engine, model, question, engine.experts[:count]))
            print(*[f"{key} {results[-1][key]}" for key in ("experts", "context", "ours_ms")], sep=", ", end="")
            for name, peer in results[-1]["peers"].items():
                print(f"; {name} {peer['ms']:.1f} ms, {peer['ratio']:.2f} x", end="")
            print()
    if arguments.json:
        report = {**environment(torch.device("cpu"), "python benchmarks/committee_vs_loop.py"), "results": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(engine: Engine, model: Any, question: str, names: list[str]) -> dict[str, Any]:
    """Milliseconds of everybody for one question to these experts. Ends the program where they do not agree."""
    context, header = engine.chat.split(question)
    first = [
        engine.chat.option(option)[:1] for option in OPTIONS
    ]  # one token each: no forward more for any of the peers
    soft = torch.stack([engine.expert(name).embeddings for name in names])
    prompt, ids = Prompt(context, header, soft), [option[0] for option in first]
    whole = Transformers(model)

    def ours() -> Tensor:
        engine.pool.forget()
        return engine.score((context, header), first, experts=names).logprobs

    def once_per_expert() -> Tensor:
        return torch.stack([loop(model, prompt, row)[ids] for row in range(len(names))])

    def context_once() -> Tensor:
        whole.forget()
        return whole.first(prompt, len(names)).log_softmax(-1)[:, ids]

    runs = {OURS: ours, "transformers-fp32, once per expert": once_per_expert, "transformers-fp32": context_once}
    found = {name: run() for name, run in runs.items()}
    error = max(float((found[OURS] - other).abs().max()) for other in found.values())
    if not error <= TOLERANCE:
        sys.exit(f"they differ by {error:.1e} for {len(names)} experts over {len(context)} tokens: nothing is timed")
    times, failed = in_turn({name: partial(timed, run) for name, run in runs.items()}, ROUNDS)
    if failed:
        sys.exit(f"failed: {failed}")
    head = {"experts": len(names), "context": len(context), "dtype": "float32", "error": error}
    return dict(rounded({**head, **compare(times)}))


@torch.inference_mode()
def loop(model: Any, prompt: Prompt, row: int) -> Tensor:
    """One forward of the whole sequence for one expert: the log-probabilities behind it, `[V]`."""
    embed = model.get_input_embeddings()
    parts = (embed(torch.tensor(prompt.context)), prompt.soft[row], embed(torch.tensor(prompt.header)))
    logits: Tensor = model(inputs_embeds=torch.cat(parts)[None], logits_to_keep=1).logits[0, -1]
    return logits.log_softmax(-1)


def timed(run: Callable[[], Tensor]) -> list[float]:
    start = time.perf_counter()
    run()
    return [(time.perf_counter() - start) * 1e3]


if __name__ == "__main__":
    main()
