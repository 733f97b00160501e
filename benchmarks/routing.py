"""How well the shipped committee is routed, by layer and pooling, and what routing adds to a prefill.

    python benchmarks/routing.py [--json FILE] [--layers 8,12,16,20,24]

Routers are trained as `make cultures` does and asked the questions of `examples/data/routing.jsonl`, none of which they have
seen: each names a country or one of its cities, or neither. Half of the cities are in no question that they were trained with. Beside
the sum over every token's scores, which is what the engine has, stand poolings of the states themselves, trained in the same way.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from whispers_engine import Engine
from whispers_engine.bench.measure import environment
from whispers_engine.evaluation.metrics import expected_calibration_error, reliability
from whispers_engine.records import read_records
from whispers_engine.router import Router, profile_text
from whispers_engine.router_examples import Example, read_examples, record_examples
from whispers_engine.router_fit import fit_tokens

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINED = ("router-train.jsonl", "router-places.jsonl", "neutral.jsonl")
POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {  # of the user's own tokens, [tokens, hidden]
    "every token": lambda states: states,
    "mean": lambda states: states.mean(0, keepdim=True),
    "largest": lambda states: states.amax(0, keepdim=True),
    "last": lambda states: states[-1:],
}
PENALTIES = (3e-2,)  # fewer than a router's own training tries, to be done sooner
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


def by_layer_and_pooling(engine: Engine, layers: Sequence[int]) -> list[dict[str, Any]]:
    examples, asked = training(), questions(engine)
    known = [engine.expert(name) for name in engine.experts]
    cultures = {engine.expert(name).culture or name: name for name in engine.experts}
    texts = {
        "train": [example.question for example in examples],
        **{names: [question for question, _ in rows] for names, rows in asked.items()},
        "far": [FAR.format(culture=culture) for culture in cultures],
        "profiles": [profile_text({"country": culture}) for culture in cultures],
        "plain": [PLAIN],
    }
    results: list[dict[str, Any]] = []
    for layer in layers:
        states = {what: read(engine, some, layer, f"layer {layer}: {what}") for what, some in texts.items()}
        for pooling, pool in POOLINGS.items():
            pooled = {what: [pool(one) for one in some] for what, some in states.items()}
            fitted = fit_tokens(known, examples, pooled["train"], layer, penalties=PENALTIES)
            row = {"layer": layer, "pooling": pooling, "held_out": fitted.top1}
            row |= measured(fitted.router, engine.experts, asked, pooled)
            results.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
            console.print(results[-1])
    return results


def measured(
    router: Router, names: list[str], asked: dict[str, list[tuple[str, str]]], pooled: dict[str, list[Tensor]]
) -> dict[str, float]:
    """How often the right expert has the largest weight, and how well the gate tells neutral questions from the others."""
    reader = router.reader
    found = {
        what: [reader.feature(reader.rows(one[None])[0].sum(0), len(one)) for one in some]
        for what, some in pooled.items()
        if what != "train"
    }

    def top1(queries: Sequence[Tensor], wanted: Sequence[str], hints: Sequence[Tensor | None]) -> float:
        got = [router.route(query, hint, names, 1)[0][0] for query, hint in zip(queries, hints, strict=True)]
        return sum(name == want for name, want in zip(got, wanted, strict=True)) / len(wanted)

    named = {what: [want for _, want in rows] for what, rows in asked.items() if what != "neutral"}
    row = {what: top1(found[what], wanted, [None] * len(wanted)) for what, wanted in named.items()}
    row["far"] = top1(found["far"], names, [None] * len(names))
    row["profile_alone"] = top1(found["plain"] * len(names), names, found["profiles"])
    low = torch.tensor([router.stake(one) for one in found["neutral"]])
    high = torch.tensor([router.stake(one) for what in named for one in found[what]])
    row["gate_auroc"] = float((high[:, None] > low).float().mean())
    return row


def read(engine: Engine, some: Sequence[str], layer: int, what: str) -> list[Tensor]:
    """The states of the users' own tokens, float32 `[tokens, hidden]` each."""
    parts = [some[first : first + 32] for first in range(0, len(some), 32)]
    return [
        one for part in track(parts, what, console=console, transient=True) for one in engine.read_tokens(part, layer)
    ]


def training() -> list[Example]:
    """What the shipped router is trained with."""
    data = EXAMPLES / "data"
    named = [example for name in TRAINED for example in read_examples(data / name)]
    return named + record_examples(read_records(data / "facts-train.jsonl"))


def questions(engine: Engine, file: str = "routing.jsonl") -> dict[str, list[tuple[str, str]]]:
    """The questions by what they name, and the expert that each is for."""
    cultures = {engine.expert(name).culture: name for name in engine.experts}
    trained = "\n".join(example.question for example in training())
    found: dict[str, list[tuple[str, str]]] = {}
    for line in (EXAMPLES / "data" / file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        names = row["names"] or "neutral"
        if names == "city":
            seen = re.search(rf"\b{re.escape(row['place'])}\b", trained)
            names = "city seen" if seen else "city unseen"
        found.setdefault(names, []).append((row["question"], cultures.get(row["culture"], "")))
    return found


def shipped(engine: Engine, file: str = "routing.jsonl") -> dict[str, Any]:
    """Whole requests: the share of questions whose expert has the largest weight, by what they name; by profile alone; right gates; how far
    the largest weights are from being right as often as they say."""
    found: dict[str, Any] = {}
    weights, firsts = [], []

    def routed(question: str, profile: dict[str, str] | None = None) -> list[tuple[str, float]]:
        events = engine.stream(question, options=["yes"], profile=profile, top_k=len(engine.experts))
        return next(events).routing  # type: ignore[union-attr]

    for names, rows in questions(engine, file).items():
        got = [routed(question)[0] for question, _ in track(rows, names, console=console, transient=True)]
        right = [name == (want or "base") for (name, _), (_, want) in zip(got, rows, strict=True)]
        found[names] = sum(right) / len(right)
        if names != "neutral":
            weights += [weight for _, weight in got]
            firsts += right
    found["ece"] = expected_calibration_error(reliability(np.array(weights), np.array(firsts, dtype=float)))
    alone = [routed(PLAIN, {"country": engine.expert(name).culture or name})[0][0] == name for name in engine.experts]
    return {**found, "profile_alone": sum(alone) / len(alone)}


def gate(engine: Engine) -> dict[str, Any]:
    """The gate alone, on single questions and on long texts of several; and profiles beside the questions of the held-out facts."""
    router = engine.router
    assert router is not None

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()]

    def stakes(texts: Sequence[str]) -> Tensor:
        return torch.tensor([router.stake(one) for one in engine.read(texts, router.reader)])

    held_out = [row["question"] for row in lines("neutral.jsonl") if row["split"] == "heldout"]
    facts = list(dict.fromkeys(row["question"] for row in lines("facts-heldout.jsonl")))
    asked = questions(engine)
    neutral = stakes([*held_out, *(question for question, _ in asked["neutral"])])
    found: dict[str, Any] = {"neutral": len(neutral), "neutral_refused": float((neutral <= 0).float().mean())}
    named = [question for names, rows in asked.items() if names != "neutral" for question, _ in rows]
    for what, texts in (("named", named), ("facts", facts)):
        high = stakes(texts)
        found[what] = {
            "n": len(high),
            "accepted": float((high > 0).float().mean()),
            "auroc": float((high[:, None] > neutral).float().mean()),
        }
    draw = random.Random(5)
    several = [" ".join(draw.sample(held_out, count)) for count in (3, 6, 12, 20) * 5]
    found["long_neutral_refused"] = float((stakes(several) <= 0).float().mean())
    one = [" ".join([*draw.sample(held_out, count), draw.choice(facts)]) for count in (3, 6, 12, 20) * 5]
    found["long_with_one_fact_accepted"] = float((stakes(one) > 0).float().mean())
    hints = engine.read(
        [profile_text({"country": engine.expert(name).culture or name}) for name in engine.experts], router.reader
    )
    right = [
        router.route(query, hint, engine.experts, 1)[0][0] == name
        for query in engine.read(facts, router.reader)
        for name, hint in zip(engine.experts, hints, strict=True)
    ]
    far = engine.read([FAR.format(culture=engine.expert(name).culture) for name in engine.experts], router.reader)
    first = [router.route(query, None, engine.experts, 1)[0][0] for query in far]
    return {
        **found,
        "profile_beside_facts": sum(right) / len(right),
        "far": sum(map(eq, first, engine.experts)) / len(far),
    }


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
    parser.add_argument("--layers", default="8,12,16,20,24")
    arguments = parser.parse_args()
    layers = [int(layer) for layer in arguments.layers.split(",") if layer]
    engine = Engine("smollm2-135m-instruct", EXAMPLES / "cultures")
    prefill = []
    for dtype in ("float32", "bfloat16"):
        two = Engine("smollm2-135m-instruct", EXAMPLES / "cultures", dtype=dtype)
        for name in two.experts[2:]:  # so that the prefill is most of the work
            two.remove_expert(name)
        prefill.append({"dtype": dtype, "tokens": PREFILL, **overhead(two)})
    report = {
        **environment(engine.model.device, " ".join(["python", *sys.argv])),
        "shipped": {**shipped(engine), "second": shipped(engine, "routing-second.jsonl"), "gate": gate(engine)},
        "prefill": prefill,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "by_layer_and_pooling": by_layer_and_pooling(engine, layers),
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
