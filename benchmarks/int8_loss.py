"""How far int8 weights move the probabilities of options: every record of a file, asked of an engine with them and of one without.

    python benchmarks/int8_loss.py FILE.jsonl [--experts 4] [--json FILE]

The base and some experts of the shipped committee score each record's options; both engines compute in the same dtype. It fails if the
mean absolute change of a probability is above 0.01.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from whispers_engine import Engine
from whispers_engine.bench.measure import environment
from whispers_engine.records import prompt, read_records

ROOT = Path(__file__).parents[1]
AT_MOST = 0.01


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engines = [Engine("smollm2-135m-instruct", ROOT / "examples" / "cultures", quantization=q) for q in (None, "int8")]
    plain = engines[0]
    asked = [[], *([name] for name in plain.experts[: arguments.experts])]
    records = [record for record in read_records(arguments.file).records if record.options]
    moved: dict[str, list[float]] = {}
    choices = 0
    for record in track(records, "scoring", console=Console(stderr=True)):
        question, options = prompt(record)
        for experts in asked:
            before, after = (
                torch.as_tensor(engine.score(question, options, experts=experts).logprobs)[0].softmax(0)
                for engine in engines
            )
            moved.setdefault(experts[0] if experts else "base", []).extend((after - before).abs().tolist())
            choices += int(before.argmax() != after.argmax())
    everything = [change for changes in moved.values() for change in changes]
    mean = sum(everything) / len(everything)
    report = {
        **environment(plain.model.device, " ".join(["python", *sys.argv])),
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "weight_MB": [round(engine.model.weight_bytes / 1e6, 1) for engine in engines],
        "questions": len(records),
        "mean_absolute_change": round(mean, 5),
        "of": {name: round(sum(changes) / len(changes), 5) for name, changes in moved.items()},
        "largest_change": round(max(everything), 4),
        "choices_that_differ": round(choices / (len(records) * len(asked)), 4),
        "at_most": AT_MOST,
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if mean > AT_MOST else 0)


if __name__ == "__main__":
    main()
