"""What is measured on: questions with what each culture answered, and the pairs of a question and a culture."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from whispers_engine.errors import WhispersError
from whispers_engine.records import ChoiceRecord, Record, RecordFile, ShareRecord, TextRecord, prompt

from .metrics import Floats

Aliases: TypeAlias = Mapping[str, str]
FORMS = ("dist", "answer")  # shares of answers, and one answer a culture


@dataclass(frozen=True, eq=False)
class Item:
    """One question.

    Attributes:
        record: the line that it is from (the first of them).
        form: "dist" or "answer".
        cluster: items of the same question text or the same `fact` have the same, and so have those that others link in this way.
        prompt, options: what is asked and what is scored.
        targets: every culture's shares, float64 `[options]`, summing to one; 1 at its answer.
        parts: of the file, under `--by`: each culture's answer is of its own line's; "other" for one that does not say.
        names: what of the culture the question names ("country", "city"), where the record says so; a question that several cultures
            answered names none of them.
    """

    record: Record
    form: str
    cluster: int
    prompt: str
    options: tuple[str, ...]
    targets: Mapping[str, Floats]
    parts: Mapping[str, str]
    names: str | None = None


@dataclass(frozen=True, eq=False)
class Pairs:
    """Questions and cultures that answered them, of one form.

    Attributes:
        item, culture, cluster: int64 `[pairs]`.
        target: float64 `[pairs, options]`; options that a question does not have are 0.
        size: int64 `[pairs]`, how many it has.
    """

    form: str
    item: NDArray[np.int64]
    culture: NDArray[np.int64]
    cluster: NDArray[np.int64]
    target: Floats
    size: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.item)


@dataclass(frozen=True)
class Dataset:
    """A file's questions.

    Attributes:
        items: those that one of the cultures answered.
        cultures: whose answers are measured, in order.
        left_out: cultures of the file that are not, and how many questions they answered.
    """

    source: RecordFile
    items: tuple[Item, ...]
    cultures: tuple[str, ...]
    left_out: Mapping[str, int]

    @property
    def parts(self) -> list[str]:
        """Of what is measured, in their order of appearance."""
        found = (part for item in self.items for culture, part in item.parts.items() if culture in self.cultures)
        return list(dict.fromkeys(found))

    @property
    def clusters(self) -> int:
        return max((item.cluster for item in self.items), default=-1) + 1

    def pairs(self, form: str) -> Pairs:
        found = [
            (at, culture, item)
            for at, item in enumerate(self.items)
            if item.form == form
            for culture, name in enumerate(self.cultures)
            if name in item.targets
        ]
        wide = max((len(item.options) for *_, item in found), default=1)
        target = np.zeros((len(found), wide))
        for row, (_, culture, item) in enumerate(found):
            target[row, : len(item.options)] = item.targets[self.cultures[culture]]

        def column(values: list[int]) -> NDArray[np.int64]:
            return np.array(values, dtype=np.int64)

        return Pairs(
            form,
            column([at for at, *_ in found]),
            column([culture for _, culture, _ in found]),
            column([item.cluster for *_, item in found]),
            target,
            column([len(item.options) for *_, item in found]),
        )


def make_dataset(
    source: RecordFile, cultures: Sequence[str] | None, aliases: Aliases | None = None, by: str | None = None
) -> Dataset:
    """Groups a file's records into questions: lines that ask the same of different cultures are one.

    Where a culture has answered a question twice, nothing says which of the two belongs beside the others' answers: each of its lines
    stands alone, so that their order decides nothing.

    Args:
        cultures: whose answers are measured, where the file has them; None: everybody's.
        aliases: names in the file, and what they are to be called.
        by: a key of the records, whose texts part the file.

    Raises:
        WhispersError: a record without options to choose from or whose answer is none of them, or a file in which none of the cultures
            has answered: names file and line.
    """
    aliases = aliases or {}
    groups: dict[tuple[str, str, tuple[str, ...]], list[tuple[Record, dict[str, Floats]]]] = {}
    for record in source.records:
        try:
            targets = _targets(record, aliases)
        except WhispersError as error:
            raise WhispersError(f"{source.where(record)}: {error}") from error
        form = "dist" if isinstance(record, ShareRecord) else "answer"
        if targets:
            groups.setdefault((form, record.question, record.options), []).append((record, targets))
    counts = Counter(name for lines in groups.values() for _, targets in lines for name in targets)
    wanted = list(counts) if cultures is None else [name for name in cultures if name in counts]
    if not wanted:
        there = ", ".join(sorted(counts)) or "none"
        asked = ", ".join(cultures or ()) or "none"
        raise WhispersError(f"{source.path}: has answers of {there}; accepted: of at least one of {asked}")
    names, facts = _more(source, "names"), _more(source, "fact")
    parts = {} if by is None else _more(source, by)
    if by is not None and not parts:
        raise WhispersError(
            f"{source.path}: no record has a text called {by!r}; accepted by --by: a key that some have"
        )
    alike, clusters, items = _alike(source, facts), dict[str, int](), []
    for (form, question, _), lines in groups.items():
        answers = Counter(name for _, targets in lines for name in targets)
        for some in [lines] if max(answers.values()) == 1 else [[line] for line in lines]:
            targets = {name: shares for _, found in some for name, shares in found.items()}
            if any(name in targets for name in wanted):
                cluster = clusters.setdefault(alike[question], len(clusters))
                record = some[0][0]
                asked, options = prompt(record)
                mine = {name: parts.get(one.line, "other") for one, found in some for name in found}
                named = names.get(record.line) if len(answers) == 1 else None
                items.append(Item(record, form, cluster, asked, tuple(options), targets, mine, named))
    left_out = {name: counts[name] for name in sorted(counts) if name not in wanted}
    return Dataset(source, tuple(items), tuple(wanted), left_out)


def _alike(source: RecordFile, facts: Mapping[int, str]) -> dict[str, str]:
    """Each question text's stand-in: the same for all that records of one fact link, directly or through others.

    Args:
        facts: by line. All records link, also those whose answers are not measured or that are one question with another record.
    """
    above = {record.question: record.question for record in source.records}

    def top(question: str) -> str:
        while above[question] != question:
            question = above[question] = above[above[question]]
        return question

    first: dict[str, str] = {}  # the question of each fact that is met first
    for record in source.records:
        if record.line in facts:
            above[top(record.question)] = top(first.setdefault(facts[record.line], record.question))
    return {question: top(question) for question in above}


def _targets(record: Record, aliases: Aliases) -> dict[str, Floats]:
    if not record.options:
        raise WhispersError("has no options to choose from; accepted: records with options")
    found: dict[str, Floats] = {}
    for culture, shares in _answers(record).items():
        name = aliases.get(culture, culture)
        if name in found:
            raise WhispersError(f"two of its cultures are called {name!r}; accepted: aliases that tell them apart")
        found[name] = shares / shares.sum()
    return found


def _answers(record: Record) -> dict[str, Floats]:
    options = len(record.options)
    if isinstance(record, ShareRecord):
        return {culture: np.array(shares) for culture, shares in record.dist.items()}
    if isinstance(record, ChoiceRecord):
        return {culture: np.eye(options)[index] for culture, index in record.answer.items()}
    assert isinstance(record, TextRecord)
    if record.answer not in record.options:
        raise WhispersError(f"answer is {record.answer!r}; accepted: one of its options, {', '.join(record.options)}")
    return {record.culture: np.eye(options)[record.options.index(record.answer)]}


def _more(source: RecordFile, key: str) -> dict[int, str]:
    """A text of each record that has it, by line. Records themselves do not keep what only this reads."""
    found = {}
    lines = source.path.read_bytes().split(b"\n")
    for record in source.records:
        value = json.loads(lines[record.line - 1].removeprefix(codecs.BOM_UTF8)).get(key)
        if isinstance(value, str) and value:
            found[record.line] = value
    return found


@dataclass(frozen=True)
class Asked:
    """A question for the router alone: whom it concerns (None: culture is not at stake), and what of them it names."""

    question: str
    culture: str | None
    names: str | None


def read_asked(path: Path, aliases: Aliases, neutral: bool) -> list[Asked]:
    """Reads `{"question": ..., "culture": ..., "names": ...}`, one a line; where the culture is missing or null, none is at stake. Lines
    whose "split" is "train" are skipped: a router may have learned from them.

    Args:
        neutral: whether every line must be such a one.

    Raises:
        WhispersError: a file that cannot be read, or a line that is no such question: names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WhispersError(f"{path}: cannot be read: {error}; accepted: a file of questions") from error
    accepted = '{"question": a text}' if neutral else '{"question": a text, "culture": a text or null}'
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            question, culture, names = value["question"], value.get("culture"), value.get("names")
            right = isinstance(question, str) and bool(question.strip())
            if culture is not None:
                right = right and isinstance(culture, str) and bool(culture.strip()) and not neutral
        except (ValueError, TypeError, KeyError, AttributeError):
            right = False
        if not right:
            raise WhispersError(f"{path}:{number}: is no question of that kind; accepted: {accepted}, other keys aside")
        if value.get("split") == "train":
            continue
        known = names if isinstance(names, str) and names and culture is not None else None
        found.append(Asked(question, None if culture is None else aliases.get(culture, culture), known))
    if not found:
        raise WhispersError(
            f"{path}: holds no question to ask; accepted: one JSON object a line, not all of the split 'train'"
        )
    return found
