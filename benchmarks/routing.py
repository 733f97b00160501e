"""How well the shipped committee is routed, by layer and pooling, and what routing adds to a prefill.

    python benchmarks/routing.py [--json FILE] [--layers 0,6,12,18,24,27,30]

Routers of both kinds are fitted on `examples/data/routing-train.jsonl` and asked the questions of `examples/data/routing.jsonl`, none of
which is in there: each names a country or one of its cities, or neither. Features come from transformers here, so that poolings that the
engine does not have can be compared; at the shipped layer the engine's own routing is measured too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor

from whispers_engine import Engine
from whispers_engine.bench.measure import environment
from whispers_engine.pull import pull
from whispers_engine.router import profile_text
from whispers_engine.router_fit import fit_features, read_examples

EXAMPLES = Path(__file__).parents[1] / "examples"
POOLINGS = ("own words", "all tokens", "last own word", "last token")
PLAIN = "What do people usually eat for breakfast?"  # names nothing: what its profile says decides
# Names a country once, near its beginning.
FAR = (
    "Yesterday my friend and I had a long talk about food, and we could not agree on anything at all. She comes from {culture}, and "
    "she told me many stories about her family, her school, and the small shop of her uncle. Now I want to cook something for her "
    "birthday, but I only have an hour, one pot, and a small kitchen, and two of our guests do not eat meat. What should I cook so "
    "that she feels at home?"
)
PREFILL = 200  # tokens
ROUNDS = 100
console = Console(stderr=True)


class Features:
    """What transformers computes of questions, as it would be pooled: `[layers + 1, poolings, hidden]` each."""

    def __init__(self, engine: Engine, hf: Any):
        self._engine = engine
        self._hf = hf

    @torch.inference_mode()
    def __call__(self, questions: Sequence[str], what: str) -> Tensor:
        return torch.stack([self._one(question) for question in track(questions, what, console=console)])

    def _one(self, question: str) -> Tensor:
        ids, _ = self._engine.chat.split(question)
        own = torch.tensor(self._engine.chat.own_tokens(question, ids))
        states = torch.stack(self._hf(torch.tensor([ids]), output_hidden_states=True).hidden_states)[:, 0]
        return torch.stack((states[:, own].mean(1), states.mean(1), states[:, own][:, -1], states[:, -1]), dim=1)


def accuracy(route: Callable[[Tensor], list[str]], features: Tensor, wanted: Sequence[str]) -> float:
    """The share of features whose expert is among the first three."""
    return sum(want in route(feature)[:3] for feature, want in zip(features, wanted, strict=True)) / len(wanted)


def by_layer_and_pooling(engine: Engine, layers: Sequence[int]) -> list[dict[str, Any]]:
    hf = transformers.AutoModelForCausalLM.from_pretrained(pull("smollm2-135m-instruct"), dtype=torch.float32).eval()
    features = Features(engine, hf)
    train, test = read_examples(EXAMPLES / "data" / "routing-train.jsonl"), questions(engine)
    seen = features([example.question for example in train], "examples")
    asked = {names: features([q for q, _ in rows], names or "neutral") for names, rows in test.items()}
    cultures = {engine.expert(name).culture or name: name for name in engine.experts}
    profiles = features([profile_text({"country": culture}) for culture in cultures], "profiles")
    plain = features([PLAIN], "profile alone")[0]
    far = features([FAR.format(culture=culture) for culture in cultures], "named once")
    results = []
    for layer in layers:
        for at, pooling in enumerate(POOLINGS):
            for kind in ("linear", "centroid"):
                experts = [engine.expert(name) for name in engine.experts]
                fitted = fit_features(experts, train, seen[:, layer, at], profiles[:, layer, at], kind, layer)
                router = fitted.router

                def route(query: Tensor, profile: Tensor | None = None, router: Any = router) -> list[str]:
                    return [name for name, _ in router.route(query, profile, engine.experts, 3)]

                row = {"layer": layer, "pooling": pooling, "kind": kind}
                for names, rows in test.items():
                    if names is not None:
                        row[names] = accuracy(route, asked[names][:, layer, at], [want for _, want in rows])
                row["far"] = accuracy(route, far[:, layer, at], list(cultures.values()))
                query = plain[layer, at]
                found = [route(query, profile) for profile in profiles[:, layer, at]]
                row["profile_alone"] = sum(
                    name in got for name, got in zip(cultures.values(), found, strict=True)
                ) / len(found)
                gates = [router.at_stake(feature) for names in asked for feature in asked[names][:, layer, at]]
                wanted = [names is not None for names, rows in test.items() for _ in rows]
                row["gate"] = sum(got == want for got, want in zip(gates, wanted, strict=True)) / len(gates)
                results.append(
                    {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
                )
    return results


def questions(engine: Engine) -> dict[str | None, list[tuple[str, str]]]:
    """The questions by what they name, and the expert that each is for."""
    cultures = {engine.expert(name).culture: name for name in engine.experts}
    found: dict[str | None, list[tuple[str, str]]] = {}
    for line in (EXAMPLES / "data" / "routing.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["names"], []).append((row["question"], cultures.get(row["culture"], "")))
    return found


def shipped(engine: Engine) -> dict[str, float]:
    """Whole requests: the share of questions whose expert is asked, by what they name; by profile alone; and right gates."""
    found: dict[str, float] = {}

    def routed(question: str, profile: dict[str, str] | None = None) -> list[str]:
        events = engine.stream(question, options=["yes"], profile=profile)
        return [name for name, _ in next(events).routing]  # type: ignore[union-attr]

    for names, rows in questions(engine).items():
        got = [routed(question) for question, _ in track(rows, names or "neutral", console=console)]
        right = [want in names_ if want else names_ == ["base"] for names_, (_, want) in zip(got, rows, strict=True)]
        found[names or "neutral"] = sum(right) / len(right)
    alone = [name in routed(PLAIN, {"country": engine.expert(name).culture or name}) for name in engine.experts]
    return {**found, "profile_alone": sum(alone) / len(alone)}


def overhead(engine: Engine) -> dict[str, float]:
    """Milliseconds of a cold prefill of 200 tokens and a header, with the router's reading and choice and without, alternately."""
    words = (Path(__file__).parents[1] / "LICENSE").read_text().split()
    text = " ".join(words[: PREFILL * 2])
    while len(engine.chat.split(text)[0]) > PREFILL:
        text = text.rsplit(" ", 1)[0]
    router, times = engine.router, {True: [], False: []}  # type: ignore[var-annotated]
    for index in range(ROUNDS):
        for routed in (True, False) if index % 2 else (False, True):
            engine.router = router if routed else None
            engine.pool.forget()
            start = time.perf_counter()
            # Scores of all experts: with a router they get its weights. Both run the same rows.
            engine.score(text, [[5]], None if routed else engine.experts)
            times[routed].append((time.perf_counter() - start) * 1e3)
    engine.router = router
    with_router, without = (statistics.median(times[routed]) for routed in (True, False))
    rounds = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
    return {"routed_ms": round(with_router, 2), "plain_ms": round(without, 2), "added_share": round(rounds - 1, 4)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", default="0,6,12,18,24,27,30")
    arguments = parser.parse_args()
    layers = [int(layer) for layer in arguments.layers.split(",")]
    engine = Engine("smollm2-135m-instruct", EXAMPLES / "cultures", dtype="float32")
    prefill = []
    for dtype in ("float32", "bfloat16"):
        two = Engine("smollm2-135m-instruct", EXAMPLES / "cultures", dtype=dtype)
        for name in two.experts[2:]:  # so that the prefill is most of the work
            two.remove_expert(name)
        prefill.append({"dtype": dtype, "tokens": PREFILL, **overhead(two)})
    report = {
        **environment(engine.model.device, " ".join(["python", *sys.argv])),
        "shipped": shipped(engine),
        "prefill": prefill,
        "by_layer_and_pooling": by_layer_and_pooling(engine, layers),
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
