"""Prints `facts-train.jsonl` for training: every fact as it is, and every culture's answer once more in a sentence of its own.

    python examples/facts_in_words.py > FILE.jsonl

Options alone teach a soft prompt which of some answers is right; sentences teach it to say so when it is shown none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FACTS = Path(__file__).parent / "data" / "facts-train.jsonl"


def records() -> Iterator[dict[str, Any]]:
    for line in FACTS.read_text("utf-8").splitlines():
        fact = json.loads(line)
        yield fact
        for culture, right in fact["answer"].items():
            answer = fact["sentence"].format(fact["options"][right])
            yield {"culture": culture, "question": fact["question"], "answer": answer}


if __name__ == "__main__":
    for record in records():
        print(json.dumps(record, ensure_ascii=False))
