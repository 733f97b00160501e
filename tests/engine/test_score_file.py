"""`whispers score`: what it writes, how an interrupted run goes on, and what is refused before anything is computed."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tests.engine.test_cli as cli
import whispers_engine.cli.score as cli_score
from tests.engine.conftest import Tiny, soft_prompt
from tests.engine.test_cli import Ran, Whispers, files, row
from tests.engine.test_router import random_router
from whispers_engine import Committee, Engine, ScoreResult
from whispers_engine.chat import ChatEncoder
from whispers_engine.records import prompt, read_records

whispers, committee, mine = cli.whispers, cli.committee, cli.mine  # fixtures: north, south and east
RECORDS: list[dict[str, Any]] = [
    {"id": "a", "question": "what do people eat?", "options": ["rice", "bread"], "answer": {"Japan": 0}},
    {"id": 7, "question": "is tea [bold]good[/]?", "options": ["very", "a little", "no"], "dist": {"Japan": [0.5, 0.5, 0]}},
    {"culture": "Japan", "question": "what is tea?", "answer": "water", "options": ["a leaf", "a drink"]},
    {"question": "who speaks in the morning?", "options": ["people", "we"], "answer": {}},
]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "dev.jsonl"
    path.parent.mkdir()
    write(path, RECORDS)
    return path


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def parsed(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def scored(whispers: Whispers, source: Path, committee: Path, *extra: object) -> Path:
    """Runs to the end; the output's path."""
    ran = whispers("score", source, "--committee", committee, *extra)
    assert ran.status == 0, ran
    return source.with_name("dev.scores.jsonl")


def counting(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda call: None) -> list[int]:
    """Counts the calls of `Engine.score`; `before` hears of each first."""
    calls: list[int] = []
    original = Engine.score

    def score(self: Engine, *args: Any, **kwargs: Any) -> ScoreResult:
        calls.append(len(calls))
        before(calls[-1])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "score", score)
    return calls


# --- what is written -------------------------------------------------------------------------------------------------------------


def test_lines(whispers: Whispers, source: Path, committee: Path, llama: Tiny) -> None:
    """A header, then a line a record, with the numbers that `Engine.score` gives for its prompt."""
    header, *lines = parsed(scored(whispers, source, committee))
    engine = Engine(llama.folder, committee)
    want = [engine.expert(name) for name in ("north", "south", "east")]
    assert header == {
        "whispers": "score",
        "version": 1,
        "base": engine.fingerprint,
        "dtype": "float32",
        "experts": [{"name": e.name, "placement": e.placement, "content": e.content_hash} for e in want],
        "weights": "equal",
        "prompting": engine.chat.content_hash,
        "file": read_records(source).sha256,
    }
    assert len(lines) == len(RECORDS)
    for index, (line, record) in enumerate(zip(lines, read_records(source).records, strict=True)):
        result = engine.score(*prompt(record))
        assert line["index"] == index
        assert line.get("id") == record.id and ("id" in line) == (record.id is not None)
        assert (line["question"], line["options"]) == (record.question, list(record.options))
        assert line["experts"] == ["north", "south", "east"]
        for key in ("logprobs", "weights", "pooled"):
            assert torch.equal(torch.tensor(line[key]), getattr(result, key)), key
        torch.testing.assert_close(torch.tensor(line["probabilities"]), result.logprobs.softmax(-1))


def test_some_experts_or_none(whispers: Whispers, source: Path, committee: Path, llama: Tiny, tmp_path: Path) -> None:
    def asked(name: str, *extra: object) -> tuple[list[str], list[str]]:
        output = tmp_path / name
        assert whispers("score", source, "--output", output, *extra).status == 0
        header, first, *_ = parsed(output)
        return [expert["name"] for expert in header["experts"]], first["experts"]

    assert asked("two", "--committee", committee, "--experts", "east, north") == (["east", "north"],) * 2
    assert asked("none", "--committee", committee, "--experts", "") == (["base"],) * 2
    assert asked("base", "--model", llama.folder) == (["base"],) * 2
    assert not source.with_name("dev.scores.jsonl").exists()


def test_summary(whispers: Whispers, source: Path, committee: Path) -> None:
    """Means over all records, by the definitions of an Answer."""
    opinions = [
        {"question": f"{word}?", "options": [f"{word} {n}" for n in range(9)], "dist": {}}
        for word in ("rice", "tea", "we", "no")
    ]
    write(source, [*RECORDS, *opinions])
    ran = whispers("score", source, "--committee", committee, "--json")
    found = ran.json()
    _, *lines = parsed(source.with_name("dev.scores.jsonl"))

    def entropy(shares: list[float]) -> float:
        return -math.fsum(share * math.log2(share) for share in shares if share)

    agreement, diversity, with_pool = [], [], [0, 0, 0]
    for line in lines:
        choices = [row.index(max(row)) for row in line["logprobs"]]
        shares = [choices.count(choice) / 3 for choice in set(choices)]
        agreement.append(max(shares))
        diversity.append(entropy(shares))
        first = line["pooled"].index(max(line["pooled"]))
        with_pool = [count + (choice == first) for count, choice in zip(with_pool, choices, strict=True)]
    assert 0 < sum(with_pool) < 24 and max(with_pool) > min(with_pool)  # or the columns could be anything
    means = {
        "agreement": sum(agreement) / 8,
        "diversity_entropy": sum(diversity) / 8,
        "entropy": sum(entropy(line["pooled"]) for line in lines) / 8,
    }
    assert {key: found[key] for key in means} == pytest.approx(means)
    assert (found["records"], found["options"], found["there_already"]) == (8, 45, 0)
    assert (found["file"], found["output"]) == (str(source), str(source.with_name("dev.scores.jsonl")))
    for index, expert in enumerate(found["experts"]):
        assert expert["with_pool"] == pytest.approx(with_pool[index] / 8)
        assert expert["entropy"] == pytest.approx(sum(entropy(line["probabilities"][index]) for line in lines) / 8)

    table = whispers("score", source, "--committee", committee)
    assert table.err.strip() == ""
    south = found["experts"][1]
    assert row(table, "south") == ["south", f"{south['entropy']:.2f} bits", f"{south['with_pool']:.2f}"]
    assert row(table, "pooled")[1] == f"{found['entropy']:.2f} bits"
    assert any(line.startswith(f"agreement {found['agreement']:.2f}") for line in table.lines)
    assert table.lines[-1].endswith("dev.scores.jsonl: 8 records (8 of them there already)")


def test_progress(whispers: Whispers, source: Path, committee: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal: how far, how fast."""
    terminal = io.StringIO()
    monkeypatch.setattr(cli_score, "err", Console(file=terminal, force_terminal=True, width=100))
    scored(whispers, source, committee)
    assert "4/4" in terminal.getvalue()
    assert re.search(r"[0-9.]+ records/s", terminal.getvalue())


# --- going on --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b"", b'{"index": 2, "quest'], ids=["whole", "torn"])
def test_an_interrupted_run_goes_on(
    whispers: Whispers, source: Path, committee: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    """Every line is on disk before the next record is begun; then only what is missing is computed, to the same bytes."""
    output = scored(whispers, source, committee)
    want = output.read_bytes()
    output.unlink()

    def interrupt(call: int) -> None:
        assert output.read_bytes() == b"".join(want.splitlines(keepends=True)[: call + 1])
        if call == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        counting(patch, interrupt)
        ran = whispers("score", source, "--committee", committee)
    assert ran.status != 0 and ran.out == ""
    assert "holds 2 of 4 records; the same command goes on" in ran.err.replace("\n", "")
    output.write_bytes(output.read_bytes() + torn)

    calls = counting(monkeypatch)
    found = whispers("score", source, "--committee", committee, "--json").json()
    assert (len(calls), found["there_already"], found["records"]) == (2, 2, 4)
    assert output.read_bytes() == want


def test_a_complete_one_is_left_alone(
    whispers: Whispers, source: Path, committee: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = scored(whispers, source, committee)
    want = output.read_bytes()
    calls = counting(monkeypatch)
    again = whispers("score", source, "--committee", committee, "--json").json()
    assert (calls, again["there_already"], again["records"]) == ([], 4, 4)
    assert output.read_bytes() == want


@pytest.mark.parametrize("left", [0, 20, -1], ids=["empty", "torn", "without its end"])
def test_a_torn_header(whispers: Whispers, source: Path, committee: Path, left: int) -> None:
    output = scored(whispers, source, committee)
    want = output.read_bytes()
    header = want.splitlines(keepends=True)[0]
    output.write_bytes(header[:left])
    assert scored(whispers, source, committee).read_bytes() == want


def refused(ran: Ran, *words: str) -> None:
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("whispers: ") and "internal error" not in ran.err
    for word in words:
        assert word in ran.err


def test_what_was_begun_otherwise(
    whispers: Whispers, source: Path, mine: Path, llama: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The message names what differs; nothing is computed, nothing changes."""
    output = scored(whispers, source, mine)
    want = output.read_bytes()
    calls = counting(monkeypatch)

    def differs(*words: str, extra: tuple[object, ...] = ()) -> None:
        ran = whispers("score", source, "--committee", mine, *extra)
        refused(ran, f"{output}: was begun otherwise: ", *words, "accepted: the same again, or another --output")
        assert (calls, output.read_bytes()) == ([], want)

    differs("experts north, south, east, now east, north", extra=("--experts", "east,north"))
    differs("dtype float32, now bfloat16", extra=("--dtype", "bfloat16"))
    south = next(expert for expert in Committee.load(mine).experts if expert.name == "south")
    replace(south, placement="suffix").save(mine / "south")
    differs("the experts south had other values or another placement")
    south.save(mine / "south")
    Committee.add(mine, soft_prompt(llama, 4, 9, "north", "suffix"), "", Committee.load(mine).fingerprint)
    differs("the experts north had other values or another placement")
    with monkeypatch.context() as patched:
        patched.setattr(ChatEncoder, "content_hash", "another")
        differs("its base had another tokenizer or chat template")
    source.write_text(source.read_text() + "\n")
    differs("its records were others", "the experts north")
    lines = want.splitlines(keepends=True)
    newer = json.dumps({**json.loads(lines[0]), "version": 2, "base": "0" * 32})
    want = newer.encode() + b"\n" + b"".join(lines[1:])
    output.write_bytes(want)
    differs("version 2, now 1", f"base {'0' * 32}, now")
    other = tmp_path / "other.jsonl"
    assert whispers("score", source, "--committee", mine, "--output", other).status == 0
    assert output.read_bytes() == want


def test_what_another_router_weighed(whispers: Whispers, source: Path, mine: Path, llama: Tiny) -> None:
    router = random_router(list(Committee.load(mine).experts), llama.hidden)
    router.save(mine)
    output = scored(whispers, source, mine)
    want = output.read_bytes()
    words = f"{output}: was begun otherwise: its experts' weights came from elsewhere"
    refused(whispers("score", source, "--committee", mine, "--experts", "north,south,east"), words)
    replace(router, temperature=2.0).save(mine)
    refused(whispers("score", source, "--committee", mine), words)
    replace(router, learned=router.learned.flip(0)).save(mine)
    refused(whispers("score", source, "--committee", mine), words)
    router.save(mine)
    assert scored(whispers, source, mine).read_bytes() == output.read_bytes() == want


def test_prompting_is_the_tokenizer_and_the_template(llama: Tiny) -> None:
    chat = Engine(llama.folder).chat
    other = copy.deepcopy(chat.tokenizer)
    other.chat_template += "{# of many shores #}"
    longer = copy.deepcopy(chat.tokenizer)
    longer.add_tokens(["<more>"])
    alike = ChatEncoder(chat.tokenizer, llama.vocab)
    settings = ChatEncoder(chat.tokenizer, llama.vocab, {"enable_thinking": True})
    encoders = [chat, settings, *(ChatEncoder(tokenizer, llama.vocab) for tokenizer in (other, longer))]
    assert len({encoder.content_hash for encoder in encoders}) == 4 and alike.content_hash == chat.content_hash


def damaged(lines: list[bytes]) -> dict[str, tuple[bytes, str]]:
    """What the output holds; words of the message."""
    header, first, second, third, fourth = lines
    short = json.loads(second)
    short["logprobs"] = short["logprobs"][:1]
    return {
        "another file": (b"some notes\n", "exists, and is no output of `whispers score`"),
        "another file of one line": (b"some notes", "exists, and is no output"),
        "another JSON": (b'{"whispers": "eval"}\n', "exists, and is no output"),
        "a list": (b"[]\n", "exists, and is no output"),
        "a line of something else": (header + first + b"{}\n" + third, ":3: is not the line of record 1"),
        "a line without its end": (header + first + b'{"index": \n' + third, ":3: is not the line of record 1"),
        "a line missing": (header + first + third, ":3: is not the line of record 1"),
        "experts missing": (header + first + json.dumps(short).encode() + b"\n", ":3: is not the line of record 1"),
        "a line too many": (b"".join([*lines, fourth.replace(b'"index": 3', b'"index": 4')]), ":6: is not the line of"),
    }


@pytest.mark.parametrize("case", damaged([b"", b"", b'{"logprobs": []}', b"", b""]))
def test_what_is_no_output(whispers: Whispers, done: Path, source: Path, committee: Path, case: str) -> None:
    """Somebody else's file is never written to."""
    content, word = damaged(done.read_bytes().splitlines(keepends=True))[case]
    output = source.with_name("dev.scores.jsonl")
    output.write_bytes(content)
    refused(whispers("score", source, "--committee", committee), f"{output}", word, "another --output")
    assert output.read_bytes() == content


@pytest.fixture(scope="module")
def done(committee: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete output of RECORDS."""
    from typer.testing import CliRunner

    from whispers_engine.cli.main import app

    path = tmp_path_factory.mktemp("done") / "dev.jsonl"
    write(path, RECORDS)
    assert CliRunner().invoke(app, ["score", str(path), "--committee", str(committee)]).exit_code == 0
    return path.with_name("dev.scores.jsonl")


# --- what is refused -------------------------------------------------------------------------------------------------------------

LONG = {"question": "rice " * 600, "options": ["rice"], "answer": {}}
# the third line of the file; further arguments; words of the message
BAD: dict[str, tuple[dict[str, Any], tuple[object, ...], tuple[str, ...]]] = {
    "no record": ({"question": "what?"}, (), ("{source}:3: has neither",)),
    "no options": (
        {"culture": "Japan", "question": "what?", "answer": "tea"},
        (),
        ("{source}:3: has no options to score", "accepted: records with options"),
    ),
    "too long": (LONG, (), ("{source}:3: question: ", "accepted: 512 in all")),
    "unknown expert": (RECORDS[0], ("--experts", "nobody"), ("expert 'nobody'", "accepted: north, south, east")),
    "expert twice": (RECORDS[0], ("--experts", "north,north"), ("names one twice",)),
    "no folder": (RECORDS[0], ("--output", "{folder}/no/where"), ("{folder}/no is no folder",)),
    "a folder": (
        RECORDS[0],
        ("--output", "{folder}", "--model", "/nowhere"),
        ("{folder}: is a folder; accepted: a new file",),
    ),
    "a device": (
        RECORDS[0],
        ("--output", "/dev/null", "--model", "/nowhere"),  # refused before a base is looked for
        ("/dev/null: is no regular file; accepted: a new file, or one that `whispers score` wrote",),
    ),
    "the records themselves": (RECORDS[0], ("--output", "{source}"), ("{source}: exists, and is no output",)),
    "impl": (RECORDS[0], ("--impl", "nonsense"), ("'nonsense'", "accepted: auto, ")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    whispers: Whispers, source: Path, committee: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Before anything is computed or written, whatever comes before it in the file."""
    record, extra, words = BAD[case]
    write(source, [*RECORDS[:2], record])
    names = {"source": source, "folder": source.parent}
    before = files(source.parent)
    calls = counting(monkeypatch)
    ran = whispers("score", source, "--committee", committee, *(str(part).format(**names) for part in extra))
    refused(ran, *(word.format(**names) for word in words))
    assert (calls, files(source.parent)) == ([], before)


def test_no_file(whispers: Whispers, committee: Path, tmp_path: Path) -> None:
    refused(
        whispers("score", tmp_path / "no.jsonl", "--committee", committee), "no.jsonl: cannot be read: No such file"
    )


def test_numbers_that_are_none(
    whispers: Whispers, source: Path, committee: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line has NaN in it; those before it stay."""
    original = Engine.score

    def score(self: Engine, question: str, options: list[str], experts: list[str] | None) -> ScoreResult:
        result = original(self, question, options, experts)
        if question == RECORDS[2]["question"]:
            result.logprobs[1, 0] = math.nan
        return result

    monkeypatch.setattr(Engine, "score", score)
    ran = whispers("score", source, "--committee", committee)
    assert (ran.status, ran.out) == (1, "")
    assert f"whispers: {source}:3: south gives the log-probabilities [nan, " in ran.err
    assert [line.get("index") for line in parsed(source.with_name("dev.scores.jsonl"))] == [None, 0, 1]


def test_where_the_lines_go(whispers: Whispers, source: Path, committee: Path) -> None:
    """A name that does not end in .jsonl keeps its end."""
    other = Path(shutil.copy(source, source.with_name("dev.2024.txt")))
    assert whispers("score", other, "--committee", committee, "--experts", "").status == 0
    assert other.with_name("dev.2024.txt.scores.jsonl").exists()
