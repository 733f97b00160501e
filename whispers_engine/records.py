"""Records: questions with what people answered, one JSON object a line, and how a record becomes a prompt."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import WhispersError

LETTERS = string.ascii_uppercase  # what the options of a `dist` record are called
INSTRUCTION = "Answer with the letter only."
_TOLERANCE = 1e-3  # of the sum of shares
_FORMS = (
    'question with "culture" and "answer" (a text), with "options" and "answer" (an object from cultures to the index of an option), '
    'or with "options" and "dist" (an object from cultures to lists of shares)'
)


@dataclass(frozen=True)
class Record:
    """One line of a file.

    Attributes:
        line: its number in the file, from 1.
        id: the record's own name; None where it has none.
        options: texts to choose from; a `TextRecord` may have none.
    """

    line: int
    id: str | int | None
    question: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class TextRecord(Record):
    """What one culture answers, in words."""

    culture: str
    answer: str


@dataclass(frozen=True)
class ChoiceRecord(Record):
    """Which option is each culture's."""

    answer: Mapping[str, int]  # culture -> index of an option


@dataclass(frozen=True)
class ShareRecord(Record):
    """How each culture's answers are spread over the options."""

    dist: Mapping[str, tuple[float, ...]]  # culture -> a share per option, summing to one within 1e-3


@dataclass(frozen=True)
class RecordFile:
    """A file's records, and the SHA-256 of the bytes that they were read from."""

    path: Path
    records: tuple[Record, ...]
    sha256: str

    def where(self, record: Record) -> str:
        """`file:line`, for messages."""
        return f"{self.path}:{record.line}"


def prompt(record: Record) -> tuple[str, list[str]]:
    """How a record becomes a prompt: the question to ask, and the texts that are scored as its answers.

    Options with shares are opinions and are listed with letters, which are scored; any other question stands alone, and the options' own
    texts are scored (none for a `TextRecord` without options).
    """
    if not isinstance(record, ShareRecord):
        return record.question, list(record.options)
    letters = list(LETTERS[: len(record.options)])
    listed = "\n".join(f"{letter}. {_listed(option)}" for letter, option in zip(letters, record.options, strict=True))
    return f"{record.question}\n\n{listed}\n\n{INSTRUCTION}", letters


def _listed(option: str) -> str:
    """A line, whatever white space is in it."""
    return " ".join(option.split())


def read_records(path: str | Path) -> RecordFile:
    """Reads and checks a whole file of records; empty lines are skipped, unknown keys ignored.

    Raises:
        WhispersError: a file that cannot be read or holds no record, or a line that is no record: names file and line, what was found
            and what is accepted.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WhispersError(f"{path}: cannot be read: {error.strerror}; accepted: a file of records") from error
    records = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            try:
                records.append(_record(number, line))
            except WhispersError as error:
                raise WhispersError(f"{path}:{number}: {error}") from error
    if not records:
        raise WhispersError(f"{path}: holds no record; accepted: one JSON object a line")
    return RecordFile(path, tuple(records), hashlib.sha256(data).hexdigest())


def _record(number: int, line: bytes) -> Record:
    value = _parse(line)
    question = _text(value, "question")
    options = _options(value["options"]) if value.get("options") is not None else ()
    common = (number, _id(value.get("id")), question, options)
    answer, dist = value.get("answer"), value.get("dist")
    if (answer is None) == (dist is None):
        found = 'neither "answer" nor "dist"' if dist is None else 'both "answer" and "dist"'
        raise WhispersError(f"has {found}; accepted: a {_FORMS}")
    if isinstance(answer, str):
        return TextRecord(*common, _text(value, "culture"), _text(value, "answer"))
    key, cultures = ("answer", answer) if dist is None else ("dist", dist)
    if not isinstance(cultures, dict):
        raise WhispersError(f"{key} is {_shown(cultures)}; accepted: a {_FORMS}")
    if not options:
        raise WhispersError(f'has no "options"; accepted: a {_FORMS}')
    count = len(options)
    if dist is None:
        return ChoiceRecord(*common, {culture: _index(culture, value, count) for culture, value in cultures.items()})
    if count > len(LETTERS):
        raise WhispersError(f"options: {count} of them; accepted with shares: at most {len(LETTERS)}, a letter each")
    if twice := _twice(list(map(_listed, options))):
        raise WhispersError(f"options lists {_shown(twice)} twice, white space aside; accepted: every option once")
    return ShareRecord(*common, {culture: _shares(culture, value, count) for culture, value in cultures.items()})


def _parse(line: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"the number {constant}, which is not JSON")

    try:
        value = json.loads(line.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 are a ValueError too
        # The decoder counts lines within this one.
        found = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise WhispersError(f"cannot be read as JSON: {found}; accepted: one object a line") from error
    if not isinstance(value, dict):
        raise WhispersError(f"is {_shown(value)}; accepted: one JSON object a line")
    return value


def _id(value: Any) -> str | int | None:
    if value is None or _is_text(value) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise WhispersError(f"id is {_shown(value)}; accepted: a string, not empty, or an integer")


def _text(value: Mapping[str, Any], key: str) -> str:
    if not _is_text(value.get(key)):
        found = _shown(value[key]) if key in value else "missing"
        raise WhispersError(f"{key} is {found}; accepted: a string, not empty")
    return str(value[key])


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair can be escaped in JSON, but no tokenizer and no file takes it.
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= char <= "\udfff" for char in value)


def _options(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(map(_is_text, value)):
        raise WhispersError(f"options is {_shown(value)}; accepted: a list of strings, none empty")
    if twice := _twice(value):
        raise WhispersError(f"options names {_shown(twice)} twice; accepted: every option once")
    return tuple(value)


def _twice(options: Sequence[str]) -> str | None:
    """The first that is there more than once; none of them is empty."""
    return next((option for option, times in Counter(options).items() if times > 1), None)


def _index(culture: str, index: Any, options: int) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < options:
        raise WhispersError(
            f"answer of {_shown(culture)} is {_shown(index)}; accepted: the index of an option, 0 to {options - 1}"
        )
    return index


def _shares(culture: str, shares: Any, options: int) -> tuple[float, ...]:
    who = f"dist of {_shown(culture)}"
    numbers = isinstance(shares, list) and all(
        isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share < 1e300
        for share in shares  # their sum is finite
    )
    if not numbers or len(shares) != options:
        raise WhispersError(f"{who} is {_shown(shares)}; accepted: {options} numbers, one an option, none below 0")
    total = math.fsum(shares)
    if abs(total - 1) > _TOLERANCE * (1 + 1e-9):
        raise WhispersError(f"{who} sums to {total:.6g}; accepted: 1 within {_TOLERANCE:g}")
    return tuple(map(float, shares))


def _shown(value: Any) -> str:
    """What was found, as JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
