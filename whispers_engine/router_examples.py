"""What routers learn from: questions with the culture that they concern."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import WhispersError
from .records import RecordFile, prompt

ANY = "*"  # culture is at stake, but none is named


@dataclass(frozen=True)
class Example:
    """A question, and the culture that it concerns: an expert's, `ANY`, or None where culture is not at stake.

    `place` is the name that tells, where it is not the culture's own: what is held out holds names that the rest does not.
    """

    question: str
    culture: str | None
    place: str | None = None


def read_examples(path: str | Path) -> list[Example]:
    """Reads examples, one JSON object a line: `{"question": ..., "culture": ...}`, the culture null where none is at stake, with a "place"
    where something else than the culture is named; or `{"question": ..., "neutral": true}`. Of the split "heldout", none is read.

    Raises:
        WhispersError: a file that cannot be read, or a line that is no example: names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        # The whole text of an error of the system has the path a second time.
        reason = error.strerror if isinstance(error, OSError) else error
        raise WhispersError(f"{path}: cannot be read: {reason}; accepted: a file of examples") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            question, place = value["question"], value.get("place")
            culture = None if value.get("neutral") is True and "culture" not in value else value["culture"]
            right = isinstance(question, str) and bool(question.strip())
            right = right and all(text is None or (isinstance(text, str) and text.strip()) for text in (culture, place))
        except (ValueError, TypeError, KeyError, AttributeError):
            right = False
        if not right:
            raise WhispersError(
                f'{path}:{number}: is no example; accepted: {{"question": a text, "culture": an expert\'s, "{ANY}" or null}}, '
                'with a text as "place" or without'
            )
        if value.get("split") != "heldout":
            examples.append(Example(question, culture, place))
    return examples


def record_examples(source: RecordFile) -> list[Example]:
    """What the gate learns of a file of records: all of its questions concern culture. They are taken to name none."""
    return [Example(question, ANY) for question in dict.fromkeys(prompt(record)[0] for record in source.records)]
