"""`whispers eval`: what it writes, how an interrupted run goes on, and what is refused before anything is computed."""

from __future__ import annotations

import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tests.engine.test_cli as cli
import tests.engine.test_evaluation_rows as rows
from tests.engine.conftest import Tiny, soft_prompt
from tests.engine.test_cli import Whispers, row
from tests.engine.test_evaluation_rows import CULTURES, RECORDS, members, save, write
from tests.engine.test_router import random_router
from whispers_engine import Engine
from whispers_engine.chat import ChatEncoder
from whispers_engine.records import read_records

whispers, committee, source = cli.whispers, rows.committee, rows.source  # fixtures
ASKED: list[dict[str, Any]] = [
    {"question": "what do people eat in Peru?", "culture": "Peru", "names": "country"},
    {"question": "tea for breakfast in Lima", "culture": "Peru", "names": "city"},
    {"question": "rice, bread, tea", "culture": None},
]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return write(tmp_path / "asked.jsonl", ASKED)


@pytest.fixture
def everything(source: Path, committee: Path, asked: Path) -> list[object]:
    """Arguments that leave nothing out."""
    train = write(source.with_name("train.jsonl"), RECORDS[:2])
    return ["eval", source, "--committee", committee, "--train", train, "--questions", asked, "--resamples", 200]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the engine is asked to compute."""
    calls: list[str] = []
    for name in ("score_many", "read", "ask"):
        original = getattr(Engine, name)

        def method(self: Engine, first: Any, *args: Any, name: str = name, original: Any = original, **kw: Any) -> Any:
            if name != "score_many":
                calls.append(name)
                return original(self, first, *args, **kw)
            return original(self, (calls.append(name) or request for request in first), *args, **kw)  # type: ignore[func-returns-value]

        monkeypatch.setattr(Engine, name, method)
    yield calls


def test_what_it_writes(whispers: Whispers, everything: list[object], source: Path) -> None:
    ran = whispers(*everything, "--json")
    found = ran.json()
    folder = source.with_name("dev.eval")
    assert sorted(path.name for path in folder.iterdir()) == ["computed.jsonl", "report.html", "report.json"]
    written = json.loads((folder / "report.json").read_text())
    assert {**written, "report": str(folder), "seconds": found["seconds"]} == found
    assert found["cultures"] == ["Japan", "Peru", "Cuba"] and found["left_out"] == {"Chad": 2}
    assert list(found["metrics"]) == ["similarity", "accuracy"]
    named = found["routing"]["mixed"]["named"]
    assert {what: one["top1"]["n"] for what, one in named.items()} == {"country": 2, "city": 1, "all": 3}
    assert found["routing"]["mixed"]["profile"]["top3"]["n"] == 8
    gate = found["routing"]["mixed"]["gate"]
    assert (gate["neutral"], gate["file"]["n"], gate["questions"]["n"]) == (1, 4, 2)
    one = next(row for row in found["metrics"]["similarity"]["rows"] if row["row"] == "mixed/told/vote")
    assert set(one["asked"]) == {"relevant_share", "diversity_entropy", "completeness", "left_to_base"}
    assert one["asked"]["completeness"] == 1
    assert [one["who"] for one in found["latency"]] == ["base", "mixed: 1 expert", "mixed: 3 experts"]


def test_what_it_shows(whispers: Whispers, everything: list[object]) -> None:
    ran = whispers(*everything)
    assert ran.status == 0, ran
    for title in ("similarity, 3 answers of cultures to 2 questions", "accuracy, 5 answers", "routing, mixed"):
        assert title in ran.out
    assert row(ran, "names city")[1] == "1"
    assert "cultures left out, without an expert: Chad" in ran.out


def test_by_part(whispers: Whispers, everything: list[object], source: Path) -> None:
    records = [{**record, "topic": "food" if at == 0 else "talk"} for at, record in enumerate(RECORDS[:2])]
    write(source, [*records, *RECORDS[2:]])
    ran = whispers(*everything, "--by", "topic")
    assert ran.status == 0 and "by topic, pooled" in ran.out and "other, n = 1" in ran.out
    found = json.loads((source.with_name("dev.eval") / "report.json").read_text())
    rows = {row["row"]: row for row in found["metrics"]["similarity"]["rows"]}
    parts = rows["base"]["parts"]
    assert {name: one["n"] for name, one in parts.items()} == {"food": 2, "talk": 0, "other": 1}
    whole = rows["base"]["pooled"]["mean"]
    assert (2 * parts["food"]["mean"] + parts["other"]["mean"]) / 3 == pytest.approx(whole, abs=1e-5)
    assert "food, n = 2" in (source.with_name("dev.eval") / "report.html").read_text()
    ran = whispers(*everything, "--by", "colour")
    assert ran.status == 1 and "no record has a text called 'colour'" in ran.err


def test_a_rerun_computes_nothing_and_says_the_same(
    whispers: Whispers, everything: list[object], source: Path, computed: list[str]
) -> None:
    folder = source.with_name("dev.eval")
    assert whispers(*everything).status == 0 and computed
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    computed.clear()
    assert whispers(*everything).status == 0
    assert computed == [] and {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_another_chat_template_computes_anew(
    whispers: Whispers, everything: list[object], computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert whispers(*everything).status == 0
    first = list(computed)
    computed.clear()
    monkeypatch.setattr(ChatEncoder, "content_hash", "another")
    assert whispers(*everything).status == 0 and computed == first


def test_an_interrupted_run_goes_on(
    whispers: Whispers,
    everything: list[object],
    source: Path,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever it ends, a torn last line included, the same command computes the rest: the report is that of a run in one go."""
    folder = source.with_name("dev.eval")
    assert whispers(*everything).status == 0
    whole, lines = (
        json.loads((folder / "report.json").read_text()),
        (folder / "computed.jsonl").read_bytes().splitlines(True),
    )
    all_calls = len(computed)
    for keep in (0, 3, len(lines) // 2, len(lines) - 1):
        torn = lines[keep][: len(lines[keep]) // 2]
        (folder / "computed.jsonl").write_bytes(b"".join(lines[:keep]) + torn)
        computed.clear()
        assert whispers(*everything).status == 0
        again = json.loads((folder / "report.json").read_text())
        assert {**again, "latency": 0} == {**whole, "latency": 0}
        assert len(computed) < all_calls or keep <= 3
        assert all(json.loads(line) for line in (folder / "computed.jsonl").read_bytes().splitlines())


def test_ctrl_c_keeps_what_was_computed(
    whispers: Whispers, everything: list[object], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Engine.score_many

    def interrupted(self: Engine, *args: Any, **kw: Any) -> Iterator[Any]:
        for at, result in enumerate(original(self, *args, **kw)):
            if at == 2:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "score_many", interrupted)
        ran = whispers(*everything)
    assert ran.status != 0 and "the same command goes on" in ran.err
    folder = source.with_name("dev.eval")
    assert [path.name for path in folder.iterdir()] == ["computed.jsonl"]
    assert whispers(*everything).status == 0 and (folder / "report.json").is_file()


def test_the_page(whispers: Whispers, everything: list[object], source: Path, llama: Tiny, tmp_path: Path) -> None:
    """Well-formed, and whole in itself: no address of anything outside; what users wrote is no markup."""
    experts = members(llama)
    experts[0].record["curve"] = [{"step": 1, "train": 2.0}, {"step": 2, "train": 1.0}]
    folder = save(tmp_path / "a & b <i>", llama, experts)
    ran = whispers(*everything, "--committee", folder, "--report", tmp_path / "out")
    assert ran.status == 0, ran
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    tags = [element.tag for element in root.iter()]
    assert not {"script", "link", "iframe", "i"} & set(tags)
    for element in root.iter():
        for name, value in element.attrib.items():
            assert name not in ("href", "srcset", "style") and (
                name != "src" or value.startswith("data:image/png;base64,")
            )
    text = re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert tags.count("img") >= 6 and "a &amp; b &lt;i&gt;: culture&#x27;s expert" in page
    assert any("Training" in (element.text or "") for element in root.iter("h2"))
    html.parser.HTMLParser().feed(page)


def test_what_was_learned_is_no_test(whispers: Whispers, source: Path, llama: Tiny, tmp_path: Path) -> None:
    experts = members(llama)
    experts[1].record["data"] = {"file": "dev.jsonl", "sha256": read_records(source).sha256}
    ran = whispers("eval", source, "--committee", save(tmp_path / "seen", llama, experts))
    assert ran.status == 0 and "seen: trained on this very file: andes" in ran.err
    assert "Trained on this very file: seen: andes" in (source.with_name("dev.eval") / "report.html").read_text()


def test_one_prompt_for_every_culture(whispers: Whispers, source: Path, llama: Tiny, tmp_path: Path) -> None:
    """Experts of the same content are one to compute, and to time."""
    alike = [replace(members(llama)[0], name=f"as-{index}", culture=c) for index, c in enumerate(CULTURES)]
    found = whispers("eval", source, "--committee", save(tmp_path / "alike", llama, alike), "--json").json()
    row, other = (
        next(r for r in found["metrics"]["similarity"]["rows"] if r["row"] == f"alike/{w}") for w in ("expert", "other")
    )
    assert row["macro"] == other["macro"] and any(one["who"] == "alike: 3 experts" for one in found["latency"])


def test_without_a_committee(whispers: Whispers, source: Path, llama: Tiny, tmp_path: Path) -> None:
    ran = whispers(
        "eval", source, "--model", llama.folder, "--cultures", "Chad, Peru", "--report", tmp_path / "o", "--json"
    )
    found = ran.json()
    assert found["cultures"] == ["Chad", "Peru"] and found["committees"] == [] and found["routing"] == {}
    assert [row["row"] for row in found["metrics"]["similarity"]["rows"]] == [
        "uniform",
        "base",
        "instruction",
        "instruction-system",
        "others",
    ]


def test_other_committees_use_what_is_there(
    whispers: Whispers, everything: list[object], source: Path, llama: Tiny, tmp_path: Path, computed: list[str]
) -> None:
    """A committee with one expert more computes that one alone, beside latencies, which are asked anew."""
    assert whispers(*everything).status == 0
    before = computed.count("score_many")
    computed.clear()
    second = save(tmp_path / "second", llama, [*members(llama)[:3], soft_prompt(llama, 3, 8, "new", "suffix")])
    assert whispers(*everything, "--committee", second).status == 0
    # of the four questions alone, not of those that tell the base whom to answer as
    assert computed.count("score_many") == 4 < before and "read" not in computed


@pytest.mark.parametrize(
    "change, message",
    [
        ({"options": None, "answer": "x", "culture": "Japan", "dist": None}, "dev.jsonl:2: has no options to choose from"),
        ({"dist": None, "culture": "Japan", "answer": "stone"}, "dev.jsonl:2: answer is 'stone'; accepted: one of its options, yes, no"),
        ({"dist": {"Japan": [0.5, 0.6]}}, 'dev.jsonl:2: dist of "Japan" sums to 1.1'),
        ({"question": "rice " * 600}, r"dev.jsonl:2: question: \d+ tokens"),
    ],
)  # fmt: skip
def test_bad_records_are_refused(
    whispers: Whispers, source: Path, committee: Path, computed: list[str], change: dict[str, Any], message: str
) -> None:
    line = {"question": "x", "options": ["yes", "no"], "dist": {"Japan": [1, 0]}, **change}
    write(source, [RECORDS[0], {key: value for key, value in line.items() if value is not None}])
    ran = whispers("eval", source, "--committee", committee)
    assert ran.status == 1 and re.search(message, ran.err), ran
    assert computed == [] and not source.with_name("dev.eval").exists()


def test_bad_arguments_are_refused(
    whispers: Whispers, source: Path, committee: Path, llama: Tiny, tmp_path: Path, computed: list[str]
) -> None:
    file = write(tmp_path / "there", RECORDS[:1])
    asked = write(tmp_path / "asked.jsonl", ASKED)
    twice = save(tmp_path / "twice", llama, members(llama))
    meta = json.loads((twice / "andes" / "expert.json").read_text())
    (twice / "andes" / "expert.json").write_text(json.dumps({**meta, "culture": "Japan"}))
    narrow = save(tmp_path / "narrow", llama, members(llama))
    random_router(members(llama), 5).save(narrow)
    for extra, message in (
        (["--report", tmp_path / "no" / "where"], "--report"),
        (["--report", file], "accepted: a folder"),
        (["--resamples", 3], "--resamples 3; accepted: an integer, at least 100"),
        (["--top-k", 0], "--top-k 0"),
        (["--alias", "US"], "--alias 'US'; accepted: DATA=EXPERT"),
        (["--cultures", "Chad"], "--cultures 'Chad': Chad; accepted: names with commas between, of Japan, Peru, Cuba"),
        (["--neutral", asked], "asked.jsonl:1: is no question of that kind"),
        (["--blind", committee], "4 experts; accepted: a committee of one"),
        (["--committee", twice], "nippon and andes both speak for 'Japan'"),
        (["--train", tmp_path / "none.jsonl"], "none.jsonl: cannot be read"),
        (["--committee", narrow], "router: reads layer 2 of width 5"),
    ):
        ran = whispers("eval", source, "--committee", committee, *extra)
        assert ran.status == 1 and message in ran.err, (extra, ran)
    write(source, [{**RECORDS[0], "dist": {"Chad": [1, 0, 0]}}])
    ran = whispers("eval", source, "--committee", committee)
    assert ran.status == 1 and "has answers of Chad; accepted: of at least one of Japan, Peru, Cuba" in ran.err
    assert computed == [] and not source.with_name("dev.eval").exists()


def test_another_store_is_refused(whispers: Whispers, source: Path, committee: Path) -> None:
    folder = source.with_name("dev.eval")
    folder.mkdir()
    (folder / "computed.jsonl").write_text('{"key": "x"}\nnonsense\n')
    ran = whispers("eval", source, "--committee", committee)
    assert ran.status == 1 and "computed.jsonl:2: is no line of an evaluation" in ran.err
