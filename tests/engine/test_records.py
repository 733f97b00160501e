"""Records: what a line may hold, how it becomes a prompt, and what is said of a line that is none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from whispers_engine import WhispersError
from whispers_engine.records import ChoiceRecord, RecordFile, ShareRecord, TextRecord, prompt, read_records

QUESTION = "what do people eat for breakfast?"
OPTIONS = ["rice", "bread", "tea"]
TEXT = {"culture": "Japan", "question": QUESTION, "answer": "rice and soup"}
CHOICE = {"question": QUESTION, "options": OPTIONS, "answer": {"Japan": 0, "Italy": 1}}
SHARE = {"question": QUESTION, "options": OPTIONS, "dist": {"Japan": [0.7, 0.1, 0.2], "Italy": [0, 1, 0]}}


def written(tmp_path: Path, *lines: Any) -> Path:
    """A file of these lines, each an object or bytes."""
    path = tmp_path / "records.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def read(tmp_path: Path, *lines: Any) -> RecordFile:
    return read_records(written(tmp_path, *lines))


def test_the_three_forms(tmp_path: Path) -> None:
    found = read(tmp_path, TEXT, {**CHOICE, "id": "a-1"}, {**SHARE, "id": 7})
    text, choice, share = found.records
    assert text == TextRecord(1, None, QUESTION, (), "Japan", "rice and soup")
    assert choice == ChoiceRecord(2, "a-1", QUESTION, tuple(OPTIONS), {"Japan": 0, "Italy": 1})
    dist = {"Japan": (0.7, 0.1, 0.2), "Italy": (0.0, 1.0, 0.0)}
    assert share == ShareRecord(3, 7, QUESTION, tuple(OPTIONS), dist)
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
    assert found.where(share) == f"{found.path}:3"


def test_prompts(tmp_path: Path) -> None:
    """Opinions list their options and are answered with letters; any other question stands alone."""
    choice, share, text, bare = read(tmp_path, CHOICE, SHARE, {**TEXT, "options": OPTIONS}, TEXT).records
    assert prompt(choice) == (QUESTION, OPTIONS)
    want = f"{QUESTION}\n\nA. rice\nB. bread\nC. tea\n\nAnswer with the letter only."
    assert prompt(share) == (want, ["A", "B", "C"])
    assert prompt(text) == (QUESTION, OPTIONS)
    assert prompt(bare) == (QUESTION, [])


def test_an_option_is_one_line_of_the_list(tmp_path: Path) -> None:
    options = [" rice \n and soup", "tea"]
    (share,) = read(tmp_path, {"question": "what?", "options": options, "dist": {"Japan": [0.5, 0.5]}}).records
    assert prompt(share)[0].splitlines()[2:4] == ["A. rice and soup", "B. tea"]
    assert share.options == tuple(options)
    apart = [" rice", "rice"]  # as texts that are scored they differ
    (choice,) = read(tmp_path, changed(CHOICE, options=apart)).records
    assert prompt(choice)[1] == apart


def test_as_many_letters_as_the_alphabet_has(tmp_path: Path) -> None:
    options = [f"option {index}" for index in range(27)]
    (share,) = read(tmp_path, {**SHARE, "options": options[:26], "dist": {}}).records
    assert prompt(share)[1][-1] == "Z"
    with pytest.raises(WhispersError, match=r"records\.jsonl:1: options: 27 of them; accepted with shares: at most 26"):
        read(tmp_path, {**SHARE, "options": options, "dist": {}})
    (choice,) = read(tmp_path, {**CHOICE, "options": options}).records  # their texts are scored
    assert len(prompt(choice)[1]) == 27


def test_what_is_taken_as_it_comes(tmp_path: Path) -> None:
    """Unknown keys, empty lines, a byte order mark, Windows' line ends, and a line separator inside a string."""
    extra = {**CHOICE, "topic": ["Food"], "dist": None, "question": "what\u2028now?"}
    lines = (
        b"\xef\xbb\xbf" + json.dumps(CHOICE).encode() + b"\r",
        b"",
        b"  \r",
        json.dumps(extra, ensure_ascii=False).encode(),
    )
    assert [(record.line, record.question) for record in read(tmp_path, *lines).records] == [
        (1, QUESTION),
        (4, "what\u2028now?"),
    ]
    path = tmp_path / "unended.jsonl"
    path.write_text(json.dumps(CHOICE))
    assert len(read_records(path).records) == 1


@pytest.mark.parametrize("shares", [[0.5, 0.5, 1e-3], [0.3333, 0.3333, 0.3333], [1, 0, 0]])
def test_shares_that_sum_to_about_one(tmp_path: Path, shares: list[float]) -> None:
    (record,) = read(tmp_path, {**SHARE, "dist": {"Japan": shares}}).records
    assert isinstance(record, ShareRecord)
    assert record.dist["Japan"] == tuple(shares)


def changed(record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The record with other values; None takes a key away."""
    return {key: value for key, value in {**record, **changes}.items() if value is not None}


# what the second line holds; words of the message
BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "not JSON": (b'{"question": ', ("cannot be read as JSON: Expecting value at column 14", "one object a line")),
    "not UTF-8": (b'{"question": "\xff"}', ("cannot be read as JSON", "0xff")),
    "nested without end": (b"[" * 100_000, ("cannot be read as JSON",)),
    "NaN": (b'{"question": NaN}', ("the number NaN, which is not JSON",)),
    "a list": ([1], ("is [1]; accepted: one JSON object a line",)),
    "no question": (changed(CHOICE, question=None), ("question is missing; accepted: a string",)),
    "an empty question": (changed(CHOICE, question=" \n"), ('question is " \\n"; accepted: a string',)),
    "a question of numbers": (changed(CHOICE, question=7), ("question is 7",)),
    "half a character": (changed(CHOICE, question="\ud800"), ('question is "\\ud800"',)),
    "a long question": (changed(CHOICE, question=["x" * 100]), ("question is [" + '"' + "x" * 75 + "...;",)),
    "no answer": (changed(CHOICE, answer=None), ('has neither "answer" nor "dist"', '"culture" and "answer"')),
    "two answers": ({**CHOICE, **SHARE}, ('has both "answer" and "dist"', "accepted: a question with")),
    "an answer of numbers": (changed(CHOICE, answer=2), ("answer is 2; accepted: a question with",)),
    "dist as a list": (changed(SHARE, dist=[0.5]), ("dist is [0.5]; accepted: a question with",)),
    "no culture": (changed(TEXT, culture=None), ("culture is missing; accepted: a string",)),
    "an empty answer": (changed(TEXT, answer=""), ('answer is ""; accepted: a string',)),
    "answers without options": (changed(CHOICE, options=None), ('has no "options"',)),
    "dist without options": (changed(SHARE, options=None), ('has no "options"',)),
    "options as a string": (changed(CHOICE, options="rice"), ('options is "rice"; accepted: a list of strings',)),
    "no options at all": (changed(CHOICE, options=[]), ("options is []; accepted: a list of strings",)),
    "an option that is empty": (changed(CHOICE, options=["rice", " "]), ('options is ["rice", " "]; accepted',)),
    "an option that is a number": (changed(CHOICE, options=["rice", 2]), ('options is ["rice", 2]',)),
    "an option twice": (changed(CHOICE, options=["tea", "rice", "tea"]), ('options names "tea" twice',)),
    "an option listed twice": (
        changed(SHARE, options=["rice", " tea  time", "tea\ntime"]),
        ('options lists "tea time" twice, white space aside; accepted: every option once',),
    ),
    "an index beyond": (changed(CHOICE, answer={"Japan": 3}), ('answer of "Japan" is 3; accepted', "0 to 2")),
    "an index below": (changed(CHOICE, answer={"Japan": -1}), ('answer of "Japan" is -1',)),
    "an index that is true": (changed(CHOICE, answer={"Japan": True}), ('answer of "Japan" is true',)),
    "an option for an index": (changed(CHOICE, answer={"Japan": "rice"}), ('answer of "Japan" is "rice"',)),
    "too few shares": (changed(SHARE, dist={"Japan": [0.5, 0.5]}), ('dist of "Japan" is [0.5, 0.5]', "3 numbers")),
    "a share below 0": (changed(SHARE, dist={"Japan": [1.5, -0.5, 0]}), ("none below 0",)),
    "a share beyond numbers": (b'{"question": "q", "options": ["a"], "dist": {"Japan": [1e999]}}', ("1 numbers",)),
    "a share of many digits": (
        b'{"question": "q", "options": ["a"], "dist": {"Japan": [' + b"9" * 400 + b"]}}",
        ("1 numbers, one an option",),
    ),
    "a share that is text": (changed(SHARE, dist={"Japan": ["1", 0, 0]}), ('dist of "Japan" is ["1", 0, 0]',)),
    "a share that is true": (changed(SHARE, dist={"Japan": [True, 0, 0]}), ('dist of "Japan" is [true, 0, 0]',)),
    "shares of more": (changed(SHARE, dist={"Japan": [0.5, 0.5, 2e-3]}), ("sums to 1.002; accepted: 1 within 0.001",)),
    "shares of less": (changed(SHARE, dist={"Japan": [0.5, 0.498, 0]}), ("sums to 0.998",)),
    "percentages": (changed(SHARE, dist={"Japan": [70, 10, 20]}), ("sums to 100",)),
    "an id that is a list": ({**CHOICE, "id": [1]}, ("id is [1]; accepted: a string, not empty, or an integer",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_lines(tmp_path: Path, case: str) -> None:
    """The message has file and line, what was found and what is accepted."""
    line, words = BAD[case]
    path = written(tmp_path, CHOICE, line, CHOICE)
    with pytest.raises(WhispersError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert "; accepted: " in message
    for word in words:
        assert word in message


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(WhispersError, match=r"nowhere\.jsonl: cannot be read: No such file"):
        read_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(WhispersError, match="cannot be read: Is a directory"):
        read_records(tmp_path)
    with pytest.raises(WhispersError, match=r"records\.jsonl: holds no record; accepted: one JSON object a line"):
        read(tmp_path, b"", b" ")
