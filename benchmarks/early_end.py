"""How many branch steps the early end of decided votes saves, and that it changes no winner: every question of a file, asked twice.

    python benchmarks/early_end.py FILE.jsonl [--experts 20] [--max-tokens 12] [--json FILE]

Records with options are asked as free questions that name the options; all experts of the shipped committee answer with equal weights.
A step is one token of one branch. It fails if a winner differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from whispers_engine import Engine, SamplingParams
from whispers_engine.aggregate import normalise
from whispers_engine.bench.measure import environment
from whispers_engine.records import read_records

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engine = Engine("smollm2-135m-instruct", ROOT / "examples" / "cultures")
    names = engine.experts[: arguments.experts]
    sampling = SamplingParams(max_tokens=arguments.max_tokens)
    records = [record for record in read_records(arguments.file).records if record.options]
    steps = {True: 0, False: 0}
    ended, differing = 0, 0
    for record in track(records, "asking", console=Console(stderr=True)):
        question = f"{record.question} Choose one: {', '.join(record.options)}. Answer with the choice alone."
        answers = {
            early: engine.ask(question, experts=names, sampling=sampling, early_end=early) for early in (False, True)
        }
        for early, answer in answers.items():
            steps[early] += answer.usage["generated_tokens"]
        ended += answers[True].usage["steps_saved"] > 0
        differing += normalise(answers[True].text) != normalise(answers[False].text)
    report = {
        **environment(engine.model.device, " ".join(["python", *sys.argv])),
        "questions": len(records),
        "experts": len(names),
        "max_tokens": arguments.max_tokens,
        "steps": steps[False],
        "steps_with_early_end": steps[True],
        "saved_share": round(1 - steps[True] / steps[False], 4),
        "ended_early": ended,
        "winners_that_differ": differing,
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
