"""The command line: what it prints, where, and with which status. Bad input never shows a traceback."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import tests.engine.test_pull as pulls
import whispers_engine.experts as experts_module
import whispers_engine.pull as pull_module
from tests.engine.conftest import Tiny, kv_prompt, soft_prompt
from whispers_engine import Answer, Committee, Engine, Expert, ExpertAnswer, SamplingParams
from whispers_engine.cli.main import run

base = pulls.base  # a fixture: what a pull of `pulls.NAME` fetches
ROOT = Path(__file__).parents[2]
QUESTION = "what do people eat for breakfast"
OPTIONS = ["rice", "bread", "tea"]


@dataclass
class Ran:
    """A command that has ended."""

    status: int
    out: str
    err: str
    lines: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.lines = self.out.splitlines()
        assert "Traceback" not in self.out + self.err

    def json(self) -> Any:
        """The one JSON object that was printed, without the constants that only Python reads."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        assert (self.status, len(self.lines)) == (0, 1), self
        return json.loads(self.out, parse_constant=refuse)


Whispers = Callable[..., Ran]


@pytest.fixture
def whispers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Whispers:
    """Runs a command line in this process."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("WHISPERS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WHISPERS_DEBUG", raising=False)

    def whispers(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["whispers", *map(str, args)])
        capsys.readouterr()
        try:
            run()
            status = 0
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int)
            status = end.code or 0
        return Ran(status, *capsys.readouterr())

    return whispers


@pytest.fixture(scope="module")
def committee(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts for the tiny base, whose folder it names."""
    folder = tmp_path_factory.mktemp("committees") / "three"
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=512)
    for expert in (
        soft_prompt(llama, 4, 1, "north", "suffix"),
        soft_prompt(llama, 4, 2, "south", "prefix"),
        kv_prompt(llama, 4, 3, "east", "detached"),
    ):
        Committee.add(folder, expert, str(llama.folder), engine.fingerprint)
    return folder


@pytest.fixture
def mine(committee: Path, tmp_path: Path) -> Path:
    """A copy of that committee, to be changed."""
    return Path(shutil.copytree(committee, tmp_path / "mine"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(ran: Ran) -> list[list[str]]:
    """The cells of all tables' rows."""
    return [[cell.strip() for cell in line.strip().strip("│┃").split("│")] for line in ran.lines if "│" in line]


def row(ran: Ran, first: str) -> list[str]:
    """The one row that begins with so and so."""
    found = [cells for cells in rows(ran) if cells[0] == first]
    assert len(found) == 1, (first, ran.out)
    return found[0]


# --- in a process of its own -----------------------------------------------------------------------------------------------------


def in_a_process(*args: object, **environment: str) -> Ran:
    done = subprocess.run(
        [sys.executable, "-m", "whispers_engine.cli.main", *map(str, args)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}",
            "COLUMNS": "250",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def test_ask_in_a_process(committee: Path, whispers: Whispers) -> None:
    """Results on stdout and nothing else there, progress on stderr; the same as in this process."""
    line = ("ask", QUESTION, "--committee", committee, "--max-tokens", 3, "--dtype", "float32", "--json")
    ran, here = in_a_process(*line), whispers(*line)
    assert ran.status == 0
    got, want = ran.json(), here.json()
    assert got.keys() == want.keys()
    assert (got["text"], got["votes"]) == (want["text"], want["votes"])
    assert [expert["tokens"] for expert in got["experts"]] == [expert["tokens"] for expert in want["experts"]]


def test_errors_in_a_process(committee: Path) -> None:
    ran = in_a_process("ask", QUESTION, "--committee", committee, "--experts", "north,nobody", PYTHONIOENCODING="utf-8")
    assert (ran.status, ran.out) == (1, "")
    assert (
        ran.err.splitlines()[-1] == "whispers: expert 'nobody' is not in this committee; accepted: north, south, east"
    )


# --- ask -------------------------------------------------------------------------------------------------------------------------


def test_ask_freely(whispers: Whispers, committee: Path) -> None:
    """The table has every expert with its weight and how it ended, then the vote."""
    ran = whispers("ask", QUESTION, "--committee", committee, "--max-tokens", 3)
    assert ran.status == 0
    assert ran.lines[0].strip() == QUESTION
    for name in ("north", "south", "east"):
        cells = row(ran, name)
        assert cells[1] == "0.33"
        assert float(cells[3]) < 0
        assert cells[4] in ("length, 3 tokens", "stop, 3 tokens", "stop, 2 tokens", "stop, 1 tokens")
    assert any(line.startswith("vote: ") for line in ran.lines)
    assert ran.lines[-1].startswith("agreement 0.")
    assert "entropy" in ran.lines[-1] and "generated" in ran.lines[-1]


def test_ask_with_options(whispers: Whispers, committee: Path, llama: Tiny) -> None:
    options = [part for option in OPTIONS for part in ("--option", option)]
    ran = whispers("ask", QUESTION, "--committee", committee, *options)
    assert ran.status == 0
    want = Engine(llama.folder, committee).ask(QUESTION, OPTIONS)
    for record in want.experts:
        assert record.text in OPTIONS
        assert row(ran, record.expert)[1:] == ["0.33", record.text, f"{record.logprob:.1f}", "option"]
    assert f"vote: {want.text}" in [line.strip() for line in ran.lines]
    votes = [[f"{weight:.2f}", text] for text, weight in want.votes.items()]
    assert [cells for cells in rows(ran) if len(cells) == 2] == votes
    assert ran.lines[-1].startswith(f"agreement {want.agreement:.2f}, entropy {want.diversity_entropy:.2f} bits")


@pytest.mark.parametrize("options", [[], OPTIONS], ids=["freely", "with options"])
@pytest.mark.parametrize("aggregate", ["vote", "delegate", "mixture", "product"])
def test_ask_json(whispers: Whispers, committee: Path, llama: Tiny, aggregate: str, options: list[str]) -> None:
    """All fields of an Answer, and the answer that the engine gives."""
    extra = [part for option in options for part in ("--option", option)]
    line = ("ask", QUESTION, "--committee", committee, "--aggregate", aggregate, "--max-tokens", 3, *extra, "--json")
    got = whispers(*line).json()
    assert list(got) == [entry.name for entry in dataclasses.fields(Answer)]
    assert all(list(record) == [entry.name for entry in dataclasses.fields(ExpertAnswer)] for record in got["experts"])
    engine = Engine(llama.folder, committee)
    want = engine.ask(QUESTION, options or None, aggregate=aggregate, sampling=SamplingParams(max_tokens=3)).to_dict()
    exact = ("text", "gated", "votes", "agreement", "diversity_entropy", "usage", "options")
    assert {key: got[key] for key in exact} == {key: want[key] for key in exact}
    assert got["routing"] == [list(pair) for pair in want["routing"]]
    assert got["experts"] == want["experts"]
    assert list(got["timing"]) == ["prefill", "route", "branch_start", "decode", "aggregate", "total"]
    assert got["timing"]["total"] == pytest.approx(sum(got["timing"].values()) - got["timing"]["total"])


def test_ask_some_experts_or_none(whispers: Whispers, committee: Path) -> None:
    def asked(*extra: object) -> list[str]:
        return [
            record["expert"]
            for record in whispers("ask", QUESTION, *extra, "--max-tokens", 1, "--json").json()["experts"]
        ]

    base = json.loads((committee / "committee.json").read_text())["base"]["name"]
    assert asked("--committee", committee, "--experts", "east, north") == ["east", "north"]
    assert asked("--committee", committee, "--experts", "") == ["base"]
    assert asked("--model", base) == ["base"]
    assert asked("--model", base, "--committee", committee) == ["north", "south", "east"]


def test_ask_sampled(whispers: Whispers, committee: Path, llama: Tiny) -> None:
    """Every sampling option reaches the engine."""
    flags = {"temperature": 2.5, "top-p": 0.9, "sample-top-k": 40, "seed": 7, "max-tokens": 6}
    line = (
        "ask",
        QUESTION,
        "--committee",
        committee,
        *(part for key, value in flags.items() for part in (f"--{key}", value)),
    )
    free = whispers(*line, "--json").json()
    sampling = SamplingParams(temperature=2.5, top_p=0.9, top_k=40, seed=7, max_tokens=6)
    want = Engine(llama.folder, committee).ask(QUESTION, sampling=sampling).to_dict()
    assert free["experts"] == want["experts"]
    assert whispers(*line, "--json").json()["experts"] == free["experts"]
    assert whispers(*line, "--seed", 8, "--json").json()["experts"] != free["experts"]
    text = free["experts"][0]["text"]
    stop = next(character for character in text if character.isascii() and character.isprintable())
    stopped = whispers(*line, "--stop", stop, "--json").json()["experts"][0]
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_brackets_are_text(whispers: Whispers, committee: Path) -> None:
    """Questions, options and answers are shown as they are, whatever they look like to a library that prints markup."""
    question, options = "what is [bold]rice[/bold] or [/red]?", ["[red]rice", "[/bread]"]
    flags = [part for option in options for part in ("--option", option)]
    ran = whispers("ask", question, "--committee", committee, *flags)
    assert ran.status == 0
    assert ran.lines[0].strip() == question
    for name in ("north", "south", "east"):
        assert row(ran, name)[2] in options
        assert f"{name} (option): {row(ran, name)[2]}" in ran.err.splitlines()
    only = whispers("ask", question, "--committee", committee, "--option", options[1])
    assert only.status == 0
    assert f"vote: {options[1]}" in [line.strip() for line in only.lines]


def test_names_are_never_cut(whispers: Whispers, mine: Path, llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal of 80 columns, too: an expert's name is what one passes to --experts."""
    name = "the-people-of-the-northern-shores"
    Committee.add(mine, soft_prompt(llama, 4, 9, name, "suffix"), "", Committee.load(mine).fingerprint)
    monkeypatch.setenv("COLUMNS", "80")
    assert name in whispers("ask", QUESTION, "--committee", mine, "--max-tokens", 40).out
    assert name in whispers("ask", QUESTION, "--committee", mine, "--option", "a long answer to choose " * 5).out


# --- experts ---------------------------------------------------------------------------------------------------------------------


def test_training_a_router(whispers: Whispers, llama: Tiny, mine: Path, tmp_path: Path) -> None:
    """Several files of examples, and the records that experts were trained with; what is there stays where something is refused."""
    named, neutral, records = (tmp_path / name for name in ("named.jsonl", "neutral.jsonl", "records.jsonl"))
    frames = (
        "what do people eat with {}",
        "{} for breakfast",
        "the people of {} speak",
        "we listen to {}",
        "{} and {}",
    )
    words = {"north": "rice", "south": "bread"}
    lines = [
        {"question": frame.format(word, word), "culture": name} for name, word in words.items() for frame in frames
    ]
    named.write_text("\n".join(map(json.dumps, lines)))
    numbers = [
        {"question": f"{n} {n} {n}", "neutral": True, "split": "train" if n % 3 else "heldout"} for n in range(12)
    ]
    neutral.write_text("\n".join(map(json.dumps, numbers)))
    records.write_text(
        json.dumps({"question": "what do people drink", "options": ["tea", "rice"], "answer": {"north": 0}})
    )
    line = ("experts", "router", named, neutral, "--committee", mine, "--records", records)
    found = whispers(*line, "--json").json()
    assert (found["kind"], found["examples"], found["experts"]) == ("token", 10 + 8 + 1, ["north", "south"])
    assert found["gate"] and found["unknown"] == ["east"] and 0 <= found["held_out_gate_auroc"] <= 1
    shown = whispers(*line).out
    assert (
        "token, layer 1, 2 experts, a gate, from 19 examples" in shown
        and "unknown to it, for want of examples: east" in shown
    )
    answer = whispers("ask", "rice for breakfast", "--option", "tea", "--committee", mine, "--json").json()
    assert answer["gated"] or {name for name, _ in answer["routing"]} == {"north", "south"}
    before = files(mine)
    named.write_text("{")
    refused = whispers(*line)
    assert refused.status != 0 and "named.jsonl:1: is no example" in refused.err
    assert files(mine) == before


def test_create_list_show(whispers: Whispers, llama: Tiny, tmp_path: Path) -> None:
    """A committee from nothing; the second expert needs no --model any more."""
    folder, text = tmp_path / "new" / "committee", "rice, bread, tea"
    first = whispers(
        "experts",
        "create",
        "japan",
        "--text",
        text,
        "--committee",
        folder,
        "--culture",
        "Japan",
        "--model",
        llama.folder,
    )
    assert first.status == 0
    tokens = len(llama.tokenizer.encode(text))
    assert first.out == f"{folder / 'japan'}: {tokens} virtual tokens, suffix\n"
    line = ("experts", "create", "1.b_c-d", "--text", text, "--committee", folder)
    assert whispers(*line, "--placement", "detached", "--virtual-tokens", 20).status == 0

    listed = whispers("experts", "list", "--committee", folder)
    assert row(listed, "japan") == ["japan", "Japan", "suffix", "embeddings", str(tokens)]
    assert row(listed, "1.b_c-d") == ["1.b_c-d", "", "detached", "embeddings", "20"]
    found = whispers("experts", "list", "--committee", folder, "--json").json()
    engine = Engine(llama.folder, folder)
    assert found["base"] == {"name": str(llama.folder), "fingerprint": engine.fingerprint}
    assert [expert["name"] for expert in found["experts"]] == engine.experts == ["japan", "1.b_c-d"]

    want = {
        "name": "japan",
        "culture": "Japan",
        "placement": "suffix",
        "kind": "embeddings",
        "virtual_tokens": tokens,
        "base": engine.fingerprint,
        "record": {"text": text},
    }
    assert found["experts"][0] == want
    shown = whispers("experts", "show", "japan", "--committee", folder, "--json").json()
    norms = engine.expert("japan").embeddings.norm(dim=-1)
    assert {key: shown[key] for key in want} == want
    assert shown["shape"] == [tokens, llama.hidden]
    assert shown["norms"] == pytest.approx(
        {"smallest": float(norms.min()), "mean": float(norms.mean()), "largest": float(norms.max())}
    )
    table = whispers("experts", "show", "japan", "--committee", folder)
    assert row(table, "record") == ["record", f"text: {text}"]
    assert row(table, "shape") == ["shape", f"[{tokens}, {llama.hidden}]"]

    again = whispers("experts", "create", "japan", "--text", "tea", "--committee", folder)
    assert again.status == 0 and again.out.endswith("virtual tokens, suffix; replaced the one of that name\n")
    replaced = Committee.load(folder).experts
    assert [expert.name for expert in replaced] == ["japan", "1.b_c-d"]
    assert replaced[0].record == {"text": "tea"}


def test_a_path_stays_whole(whispers: Whispers, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However narrow what is no terminal says it is: a path that was broken is none."""
    monkeypatch.setenv("COLUMNS", "20")
    made = whispers("experts", "create", "x", "--text", "tea", "--committee", mine)
    assert made.out.startswith(f"{mine / 'x'}: ") and len(made.lines) == 1
    out = whispers("experts", "export", "south", tmp_path / "adapter", "--committee", mine)
    assert out.out == f"{tmp_path / 'adapter'}: 4 virtual tokens, embeddings\n"
    back = whispers("experts", "import", tmp_path / "adapter", "--name", "x", "--committee", mine)
    assert back.out == f"{mine / 'x'}: 4 virtual tokens, embeddings, prefix; replaced the one of that name\n"


def test_show_brackets(whispers: Whispers, mine: Path) -> None:
    """A sentence may hold what a library that prints markup takes for its own."""
    text = "rice [/b] and [red]tea"
    assert whispers("experts", "create", "b", "--text", text, "--committee", mine, "--culture", "[red]x[/]").status == 0
    shown = whispers("experts", "show", "b", "--committee", mine)
    assert row(shown, "record") == ["record", f"text: {text}"]
    assert row(whispers("experts", "list", "--committee", mine), "b")[1] == "[red]x[/]"


@pytest.mark.parametrize(("name", "placement"), [("south", "prefix"), ("east", "detached"), ("north", "suffix")])
def test_export_and_import(whispers: Whispers, mine: Path, tmp_path: Path, name: str, placement: str) -> None:
    """There and back: the same function, and a warning where PEFT computes another one."""
    expert = next(expert for expert in Committee.load(mine).experts if expert.name == name)
    adapter = tmp_path / "adapter"
    out = whispers("experts", "export", name, adapter, "--committee", mine)
    assert out.status == 0
    assert ("warning" in out.err and placement in out.err) == (placement != "prefix")
    assert f"{expert.num_tokens} virtual tokens, {expert.kind}" in out.out
    assert set(files(adapter)) == {"adapter_config.json", "adapter_model.safetensors"}

    line = (
        "experts",
        "import",
        adapter,
        "--name",
        "back",
        "--committee",
        mine,
        "--placement",
        placement,
        "--culture",
        "Japan",
    )
    assert whispers(*line).status == 0
    back = Committee.load(mine).experts[-1]
    assert (back.name, back.placement, back.culture) == ("back", placement, "Japan")
    assert back.content_hash == expert.content_hash
    assert back.base == Committee.load(mine).fingerprint
    assert whispers("ask", QUESTION, "--committee", mine, "--experts", "back", "--max-tokens", 1).status == 0


# --- pull ------------------------------------------------------------------------------------------------------------------------


def test_pull_finds_what_is_there(whispers: Whispers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any) -> None:
        raise AssertionError("a download was started")

    monkeypatch.setattr(pull_module, "_download", download)
    name = "smollm2-135m-instruct"
    folder = tmp_path / "home" / "models" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert whispers("pull", name, "--json").json() == {"name": name, "folder": str(folder), "pulled": False}
    ran = whispers("pull", name)
    assert (ran.status, ran.out) == (0, f"{name}: already at {folder}\n")


def test_pull_unknown(whispers: Whispers, tmp_path: Path) -> None:
    ran = whispers("pull", "unknown")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.strip() == "whispers: no built-in base is called 'unknown'; accepted: smollm2-135m-instruct"
    assert not (tmp_path / "home").exists()


# --- a full disk -----------------------------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> None:
    """What safetensors' `save_file` does then."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_create_on_a_full_disk(whispers: Whispers, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "save_file", full)
    before = files(mine)
    ran = whispers("experts", "create", "north", "--text", "tea", "--committee", mine)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err == f"whispers: {mine / 'north' / 'adapter_model.safetensors'}: No space left on device\n"
    assert files(mine) == before


def test_pull_on_a_full_disk(whispers: Whispers, base: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulls.offered(monkeypatch, base)
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    ran = whispers("pull", pulls.NAME)
    models = tmp_path / "home" / "models"
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.strip() == f"whispers: {models / pulls.NAME / 'model.safetensors'}: No space left on device"
    assert not list(models.iterdir())


# --- bad command lines -----------------------------------------------------------------------------------------------------------

ASK = ("ask", QUESTION, "--committee", "{committee}")
CREATE = ("experts", "create", "x", "--text", "rice", "--committee", "{committee}")

# what is typed; words of the message
BAD: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "no such model": (("ask", QUESTION, "--model", "/nowhere/base"), ("model: '/nowhere/base'", "accepted: a local folder")),
    "a model without config": (("ask", QUESTION, "--model", "{empty}"), ("no config.json", "accepted: a Hugging Face folder")),
    "no such committee": (("ask", QUESTION, "--committee", "/nowhere"), ("/nowhere: no committee.json", "accepted: a committee's folder")),
    "a damaged committee": (("ask", QUESTION, "--committee", "{damaged}"), ("committee.json: cannot be read as JSON",)),
    "empty question": (("ask", " ", "--committee", "{committee}"), ("question: it is empty", "accepted: a string")),
    "question too long": (("ask", "rice " * 600, "--committee", "{committee}"), ("question:", "accepted: 512 in all")),
    "unknown expert": ((*ASK, "--experts", "nobody"), ("expert 'nobody'", "accepted: north, south, east")),
    "expert twice": ((*ASK, "--experts", "north,north"), ("names one twice", "accepted: every name once")),
    "aggregation": ((*ASK, "--aggregate", "majority"), ("aggregate: 'majority'", "accepted: vote, delegate, mixture, product, compose")),
    "top-k": ((*ASK, "--top-k", 0), ("top_k: 0", "accepted: an integer, at least 1")),
    "temperature": ((*ASK, "--temperature", -1), ("temperature -1.0", "accepted: a finite number, at least 0")),
    "temperature nan": ((*ASK, "--temperature", "nan"), ("temperature nan", "accepted: a finite number, at least 0")),
    "top-p": ((*ASK, "--top-p", 1.5), ("top_p 1.5", "accepted: above 0, at most 1")),
    "sample-top-k": ((*ASK, "--sample-top-k", -1), ("top_k -1", "accepted: an integer, at least 0")),
    "seed": ((*ASK, "--seed", -1), ("seed -1", "accepted: None or 0 to 2^64 - 1")),
    "stop": ((*ASK, "--stop", ""), ("stop", "accepted: strings, none empty")),
    "max-tokens": ((*ASK, "--max-tokens", 0), ("max_tokens 0", "accepted: an integer, at least 1")),
    "empty option": ((*ASK, "--option", "rice", "--option", ""), ("option ''", "accepted: a string or token ids, not empty")),
    "profile without a value": ((*ASK, "--profile", "Japan"), ("--profile 'Japan'", "accepted: KEY=VALUE")),
    "profile's key twice": (
        (*ASK, "--profile", "country=Japan", "--profile", " country=Italy"),
        ("--profile names 'country' twice", "accepted: every KEY once"),
    ),
    "option twice": ((*ASK, "--option", "rice", "--option", "rice"), ("options names 'rice' twice", "accepted: every option once")),
    "profile without a router": ((*ASK, "--profile", "country=Japan"), ("no router", "and a committee with a router")),
    "device": ((*ASK, "--device", "abacus"), ("device: 'abacus'", "accepted: auto, cpu")),
    "dtype": ((*ASK, "--dtype", "int4"), ("dtype: 'int4'", "accepted: auto, float32")),
    "impl": ((*ASK, "--impl", "nonsense"), ("'nonsense'", "accepted: auto, ")),
    "list of nothing": (("experts", "list", "--committee", "{empty}"), ("no committee.json", "accepted: a committee's folder")),
    "show nobody": (("experts", "show", "nobody", "--committee", "{committee}"), ("expert 'nobody'", "accepted: north, south, east")),
    "create outside": (("experts", "create", "../x", *CREATE[3:]), ("expert name '../x'", "accepted are 1 to 64")),
    "create the base": (("experts", "create", "base", *CREATE[3:]), ("expert name 'base'", "and not 'base'")),
    "create of nothing": (("experts", "create", "x", "--text", "", *CREATE[5:]), ("the text ''", "no tokens")),
    "create somewhere": ((*CREATE, "--placement", "infix"), ("placement 'infix'", "accepted: prefix, suffix, detached")),
    "create of no size": ((*CREATE, "--virtual-tokens", 0), ("virtual_tokens 0", "accepted: at least 1")),
    "create too long": ((*CREATE, "--virtual-tokens", 511), ("expert 'x': 511 virtual tokens", "accepted: at most 510", "512")),
    "create below a file": (
        (*CREATE[:5], "--committee", "{file}/committee", "--model", "{model}"),
        ("{file}", "directory"),
    ),
    "create for another base": ((*CREATE, "--model", "{other}"), ("a committee for the base", "the expert is for")),
    "import of nothing": (
        ("experts", "import", "{empty}", "--name", "x", "--committee", "{committee}"),
        ("whispers: {empty}/adapter_config.json: cannot be read: No such file or directory; accepted: a file that holds",),
    ),
    "import by a bad name": (
        ("experts", "import", "{committee}/south", "--name", "a/b", "--committee", "{committee}"),
        ("expert name 'a/b'", "accepted are"),
    ),
    "import of what is too long": (
        ("experts", "import", "{long}", "--name", "x", "--committee", "{committee}"),
        ("expert 'x': 511 virtual tokens", "accepted: at most 510", "512"),
    ),
    "a router of nothing": (
        ("experts", "router", "{empty}/none", "--committee", "{committee}"),
        ("whispers: {empty}/none: cannot be read: No such file or directory; accepted: a file of examples",),
    ),
    "import of another width": (
        ("experts", "import", "{narrow}", "--name", "x", "--committee", "{committee}"),
        ("width [32]", "this base has [64]"),
    ),
    "export of nobody": (
        ("experts", "export", "nobody", "{empty}/new", "--committee", "{committee}"),
        ("expert 'nobody'", "accepted: north, south, east"),
    ),
    "export over something": (
        ("experts", "export", "south", "{empty}", "--committee", "{committee}"),
        ("{empty}: exists", "accepted: a folder that does not"),
    ),
    "export below a file": (("experts", "export", "south", "{file}/new", "--committee", "{committee}"), ("{file}: ",)),
}  # fmt: skip


@pytest.fixture
def places(llama: Tiny, mine: Path, tmp_path: Path) -> dict[str, str]:
    """What stands in braces in a bad command line."""
    empty, damaged, file, other = (tmp_path / name for name in ("empty", "damaged", "file", "other"))
    empty.mkdir()
    damaged.mkdir()
    (damaged / "committee.json").write_text("{")
    file.write_text("a file")
    shutil.copytree(llama.folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "rope_parameters": {**config["rope_parameters"], "rope_theta": 7.0}})
    )
    Expert("narrow", torch.zeros(4, 32)).save(tmp_path / "narrow")
    Expert("long", torch.zeros(511, llama.hidden)).save(tmp_path / "long")
    there = {"empty": empty, "damaged": damaged, "file": file, "other": other}
    there |= {name: tmp_path / name for name in ("narrow", "long")}
    return {key: str(path) for key, path in {**there, "committee": mine, "model": llama.folder}.items()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(whispers: Whispers, places: dict[str, str], tmp_path: Path, case: str) -> None:
    """Status 1, one message on stderr, nothing on stdout, nothing changed on disk."""
    typed, words = BAD[case]
    before = files(tmp_path)
    ran = whispers(*(str(part).format(**places) for part in typed))
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("whispers: ")
    assert "internal error" not in ran.err
    for word in words:
        assert word.format(**places) in ran.err
    assert files(tmp_path) == before


# what is typed; a word of the message
USAGE: dict[str, tuple[tuple[Any, ...], str]] = {
    "unknown command": (("vote",), "vote"),
    "unknown option": ((*ASK, "--colour", "red"), "--colour"),
    "no question": (("ask",), "question"),
    "not a number": ((*ASK, "--top-k", "three"), "--top-k"),
    "not a temperature": ((*ASK, "--temperature", "warm"), "--temperature"),
    "an option without a value": (("ask", QUESTION, "--model"), "--model"),
    "one word too many": ((*ASK, "another"), "another"),
    "unknown experts command": (("experts", "vote"), "vote"),
    "create without a text": (("experts", "create", "x", "--committee", "{committee}"), "--text"),
    "list without a committee": (("experts", "list"), "--committee"),
    "import without a name": (("experts", "import", "{empty}", "--committee", "{committee}"), "--name"),
    "pull without a name": (("pull",), "name"),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_usage(whispers: Whispers, places: dict[str, str], tmp_path: Path, case: str) -> None:
    """Status 2, on stderr what is wrong, nothing on stdout."""
    typed, word = USAGE[case]
    before = files(tmp_path)
    ran = whispers(*(str(part).format(**places) for part in typed))
    assert (ran.status, ran.out) == (2, "")
    assert "Error" in ran.err
    assert word in ran.err.lower()
    assert files(tmp_path) == before


def test_an_error_of_our_own(whispers: Whispers, committee: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user sees one line even then; with WHISPERS_DEBUG=1, where it happened."""

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(Engine, "stream", broken)
    ran = whispers("ask", QUESTION, "--committee", committee)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err == "whispers: internal error: ZeroDivisionError: by nought (WHISPERS_DEBUG=1 shows where)\n"
    monkeypatch.setenv("WHISPERS_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        whispers("ask", QUESTION, "--committee", committee)


@pytest.mark.parametrize(
    "command", [(), ("ask",), ("pull",), ("experts",), ("experts", "create"), ("experts", "import")]
)
def test_help(whispers: Whispers, command: tuple[str, ...]) -> None:
    ran = whispers(*command, "--help")
    assert (ran.status, ran.err) == (0, "")
    assert f"Usage: whispers {' '.join(command)}".rstrip() in ran.out


def test_every_option_has_a_help(whispers: Whispers) -> None:
    """As `--seed INTEGER [default: 0]` had none."""
    from typer.main import get_command

    from whispers_engine.cli.main import app

    def commands(group: Any) -> list[Any]:
        under = [part for one in getattr(group, "commands", {}).values() for part in commands(one)]
        return [group, *under]

    found = [
        (command.name, part.name, getattr(part, "help", None))
        for command in commands(get_command(app))
        for part in command.params
    ]
    assert len(found) > 50 and [entry[:2] for entry in found if not entry[2]] == []
