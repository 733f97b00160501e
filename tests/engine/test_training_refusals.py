"""What `whispers train` refuses, before any work: by file and line where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tests.engine.test_cli as cli
import whispers_engine.training.contexts as contexts
from tests.engine.conftest import Bench, Tiny
from tests.engine.test_cli import Whispers, row
from tests.engine.test_training_run import answers, break_gradient, choices, opinions, write
from whispers_engine import Committee, Engine, WhispersError
from whispers_engine.training import Settings
from whispers_engine.training.step import Stepper

whispers = cli.whispers
GOOD = {"question": "what?", "options": ["rice", "tea"], "dist": {"South": [0.5, 0.5]}}


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(contexts.ContextStore, "get", fail)


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "data.jsonl:2: cannot be read as JSON"),
        (json.dumps({**GOOD, "dist": {"South": [0.5, 0.5, 0.0]}}), "data.jsonl:2: dist of \"South\" is [0.5, 0.5, 0.0]; accepted: 2"),
        (json.dumps({**GOOD, "dist": {"South": [0.5, 0.6]}}), 'data.jsonl:2: dist of "South" sums to 1.1; accepted: 1 within 0.001'),
        (json.dumps({"question": "q", "options": ["a"], "answer": {"South": 1}}), 'data.jsonl:2: answer of "South" is 1'),
        (json.dumps({"question": "q", "answer": "a"}), "data.jsonl:2: culture is missing"),
        (json.dumps({**GOOD, "question": "rice " * 600}), "data.jsonl:2: takes"),
    ],
)  # fmt: skip
def test_lines(whispers: Whispers, llama: Tiny, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    ran = whispers("train", path, "--out", tmp_path / "out", "--model", llama.folder)
    assert ran.status == 1 and message in ran.err and str(path) in ran.err, ran
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "West"], "data.jsonl: the culture 'West' has no example; accepted: North Shore, South"),
        (["--experts", ","], "experts: none is named"),
        (["--dev-share", "1.0"], "data.jsonl: the culture 'North Shore' has no example left to train on, all 8 are held out"),
        (["--experts", "South,South"], "experts: ['South', 'South'] names one twice; accepted: every name once"),
        (["--experts", "South,north-shore,south"], "names one twice; accepted: every name once"),
        (["--placement", "behind"], "--placement 'behind' of kind 'embeddings'; accepted: prefix, suffix, detached"),
        (["--kind", "kv"], "--placement 'suffix' of kind 'kv'; accepted: prefix, detached"),
        (["--kind", "lora"], "--kind 'lora'; accepted: embeddings, kv"),
        (["--init", "nowhere"], "init: 'nowhere'; accepted: text, vocab, the folder"),
        (["--decay", "steep"], "--decay 'steep'; accepted: linear, cosine, none"),
        (["--steps", "0"], "--steps 0; accepted: an integer, at least 1"),
        (["--shared", "-1"], "--shared -1; accepted: an integer, at least 0"),
        (["--batch", "0"], "--batch 0; accepted"),
        (["--rate", "nan"], "--rate nan; accepted"),
        (["--rate", "0"], "--rate 0; accepted: a number above 0\n"),
        (["--clip", "0"], "--clip 0; accepted: a number above 0\n"),
        (["--warmup", "1.5"], "--warmup 1.5; accepted: a number from 0 to 1"),
        (["--patience", "-1"], "--patience -1; accepted: an integer, at least 0"),
        (["--permute-options", "0"], "--permute-options 0; accepted: an integer, at least 1"),
        (["--evaluate-every", "0"], "--evaluate-every 0; accepted: an integer, at least 1"),
        (["--cache-mb", "-1"], "--cache-mb -1; accepted: an integer, at least 0"),
        (["--virtual-tokens", "600"], "data.jsonl:1: takes"),
        (["--dtype", "float16"], "dtype: 'float16'; accepted to train in: auto, float32, bfloat16"),
        (["--device", "tpu"], "device: 'tpu'"),
    ],
)  # fmt: skip
def test_arguments(whispers: Whispers, llama: Tiny, tmp_path: Path, arguments: list[str], message: str) -> None:
    path = write(tmp_path / "data.jsonl", opinions())
    ran = whispers("train", path, "--out", tmp_path / "out", "--model", llama.folder, *arguments)
    assert ran.status == 1 and message in ran.err, ran
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("nothing_computed")
def test_an_output_that_exists(whispers: Whispers, llama: Tiny, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", opinions())
    (tmp_path / "out").mkdir()
    ran = whispers("train", path, "--out", tmp_path / "out", "--model", llama.folder)
    assert ran.status == 1 and f"{tmp_path / 'out'}: exists; accepted: a folder that does not" in ran.err


@pytest.mark.usefixtures("nothing_computed")
def test_cultures_that_would_be_one_expert(whispers: Whispers, llama: Tiny, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{**GOOD, "dist": {"South": [1, 0], "south!": [0, 1]}}])
    ran = whispers("train", path, "--out", tmp_path / "out", "--model", llama.folder)
    assert "'South' and 'south!' would both be the expert 'south'" in ran.err
    path = write(tmp_path / "data.jsonl", [{**GOOD, "dist": {"日本": [1, 0]}}])
    ran = whispers("train", path, "--out", tmp_path / "out", "--model", llama.folder)
    assert "the culture '日本' gives no name for an expert" in ran.err
    path = write(tmp_path / "data.jsonl", [{**GOOD, "dist": {}}])
    ran = whispers("train", path, "--out", tmp_path / "out", "--model", llama.folder)
    assert "names no culture in any record" in ran.err


def test_settings_by_themselves() -> None:
    with pytest.raises(WhispersError, match="steps: True; accepted: an integer"):
        Settings(steps=True)
    with pytest.raises(WhispersError, match="clip: -1; accepted: a number above 0, or None"):
        Settings(clip=-1)
    with pytest.raises(WhispersError, match="clip: 0; accepted: a number above 0, or None"):
        Settings(clip=0)
    with pytest.raises(WhispersError, match="rate: 0; accepted: a number above 0"):
        Settings(rate=0)
    with pytest.raises(WhispersError, match="placement 'suffix' of kind 'kv'; accepted: prefix, detached"):
        Settings(kind="kv")
    with pytest.raises(WhispersError, match="kind: 'lora'; accepted: embeddings, kv"):
        Settings(kind="lora")
    assert Settings(clip=None).clip is None


def test_command_line(whispers: Whispers, llama: Tiny, tmp_path: Path) -> None:
    """From a file to a committee that `score` takes."""
    path = write(tmp_path / "data.jsonl", [*opinions(), *choices(), *answers()])
    line = (
        "train",
        path,
        "--model",
        llama.folder,
        "--steps",
        6,
        "--virtual-tokens",
        4,
        "--dtype",
        "float32",
        "--batch",
        3,
    )
    ran = whispers(*line, "--out", tmp_path / "one", "--experts", "South", "--shared", 4, "--licence", "MIT", "--json")
    found = ran.json()
    assert [expert["name"] for expert in found["experts"]] == ["south"] and found["examples"] == 18
    assert found["placement"] == "suffix" and found["virtual_tokens"] == 4
    record = Committee.load(tmp_path / "one").experts[0].record
    assert record["data"]["licence"] == "MIT" and record["settings"]["shared_steps"] == 4
    shown = whispers(*line, "--out", tmp_path / "two", "--placement", "detached", "--permute-options", 3)
    assert shown.status == 0 and row(shown, "south")[3] == "6"
    engine = Engine(llama.folder, committee=tmp_path / "two", page_size=8, kv_cache_tokens=2048)
    assert engine.experts == ["north-shore", "south"] and engine.expert("south").placement == "detached"
    scored = whispers("score", write(tmp_path / "dev.jsonl", opinions()), "--committee", tmp_path / "two", "--json")
    assert scored.json()["records"] == 8


def test_an_expert_that_broke_is_shown(
    whispers: Whispers, llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradient(monkeypatch, 5, 1)
    path = write(tmp_path / "data.jsonl", opinions())
    line = ("train", path, "--model", llama.folder, "--steps", 6, "--virtual-tokens", 4, "--dev-share", 0)
    ran = whispers(*line, "--out", tmp_path / "out", "--evaluate-every", 2)
    assert ran.status == 0 and row(ran, "south")[3:5] == ["4", "4"] and row(ran, "north-shore")[3:5] == ["6", "6"]
    assert "south: stopped, its weights were not finite after step 5; those of step 4 are written" in ran.out
    assert "north-shore: stopped" not in ran.out


def test_bench_train(bench: Bench, llama: Tiny) -> None:
    arguments = ("--model", str(llama.folder), "--context", "20", "--rounds", "1", "--steps", "1", "--examples", "4")
    status, printed = bench("bench", "train", *arguments, "--experts", "2", "--batch", "2", "--json")
    report = json.loads(printed)
    assert status == 0 and report["ok"] and report["dtype"] == "float32"
    assert [result["placement"] for result in report["results"]] == ["suffix", "detached"]
    for result in report["results"]:
        for check in (result["check"], result["check"]["together"]):
            assert check["ok"] and max(check["error"], check["loss_error"]) < 1e-3
        assert result["examples_s"]["ours"] == pytest.approx(2e3 / result["ours_ms"], rel=1e-3)
        peer = result["peers"]["peft-trainer"]
        assert peer["ratio"] == pytest.approx(peer["ms"] / result["ours_ms"], rel=1e-3)
        assert result["together"]["over_in_turn"] == pytest.approx(
            2 * result["ours_ms"] / result["together"]["ms"], rel=1e-3
        )
    status, printed = bench("bench", "train", *arguments, "--experts", "2", "--batch", "2")
    assert status == 0 and "detached" in printed
    status, printed = bench("bench", "train", "--batch", "0")
    assert status == 1 and "--batch 0; accepted: integers from 1 on" in printed


def _longer(losses: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return losses, 1.1 * gradient


def _zero_together(losses: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return losses, gradient if len(gradient) == 1 else 0 * gradient


def _turned_together(losses: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return losses, gradient.roll(1, 0)


def _other_losses(losses: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return losses + 0.3, gradient


@pytest.mark.parametrize("wrong", [_longer, _zero_together, _turned_together, _other_losses])
def test_bench_times_nothing_that_is_wrong(
    bench: Bench, llama: Tiny, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    right = Stepper.gradient
    monkeypatch.setattr(Stepper, "gradient", lambda *given: wrong(*right(*given)))
    arguments = ("--model", str(llama.folder), "--context", "20", "--rounds", "1", "--steps", "1", "--examples", "4")
    status, printed = bench("bench", "train", *arguments, "--experts", "2", "--batch", "2", "--json")
    assert status == 1
    for result in json.loads(printed)["results"]:
        assert not result["ok"] and not {"ours_ms", "peers", "together", "cold"} & result.keys()
    status, printed = bench("bench", "train", *arguments, "--experts", "2", "--batch", "2")
    assert status == 1 and "WRONG" in printed
