"""Training runs: what they lower, what they write, how they stop, and how a killed one goes on."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.conftest import Tiny, make_tiny, soft_prompt
from tests.engine.test_equivalence import CASES
from whispers_engine import Committee, Engine, Expert, WhispersError
from whispers_engine.records import read_records
from whispers_engine.training import Base, Progress, Settings, Trained, checkpoint, train
from whispers_engine.training.optimizer import AdamW
from whispers_engine.training.sampler import Drawn
from whispers_engine.training.step import Stepper

ROOT = Path(__file__).parents[2]
WORDS = ("rice", "bread", "tea", "shores", "people", "morning", "breakfast", "listen")


def opinions(count: int = 8) -> list[dict[str, Any]]:
    """Two cultures that answer differently, one to more questions than the other."""
    return [
        {
            "question": f"what of {WORDS[at % 8]} number {at}?",
            "options": ["rice", "bread", "tea"],
            "dist": {"North Shore": [0.7, 0.2, 0.1], **({"South": [0.1, 0.1, 0.8]} if at % 3 else {})},
        }
        for at in range(count)
    ]


def choices(count: int = 8) -> list[dict[str, Any]]:
    return [
        {"question": f"which {WORDS[at % 8]} {at}?", "options": ["rice and tea", "bread"], "answer": {"South": 0, "North Shore": 1}}
        for at in range(count)
    ]  # fmt: skip


def answers(count: int = 8) -> list[dict[str, Any]]:
    return [
        {"question": f"say {WORDS[at % 8]} {at}", "culture": ("South", "North Shore")[at % 2], "answer": f"we {WORDS[at % 2]}"}
        for at in range(count)
    ]  # fmt: skip


FORMS = {"dist": opinions, "options": choices, "answer": answers}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def base(llama: Tiny) -> Base:
    return Base.load(llama.folder, dtype="float32")


def run(base: Base, folder: Path, records: list[dict[str, Any]], **settings: Any) -> Trained:
    source = read_records(write(folder / "data.jsonl", records))
    wanted = {"steps": 30, "batch": 4, "virtual_tokens": 4, "dev_share": 0.0, "rate": 0.05, **settings}
    return train(base, source, folder / "out", Settings(**wanted))


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_lowers_the_loss(base: Base, tmp_path: Path, form: str, kind: str, placement: str) -> None:
    trained = run(base, tmp_path, FORMS[form](), kind=kind, placement=placement, evaluate_every=1)
    lowered = [expert["first_loss"] - expert["last_loss"] for expert in trained.summary["experts"]]
    assert min(lowered) > -1e-6 and max(lowered) > 0.03, trained.summary


def test_experts_speak_for_their_culture(llama: Tiny, base: Base, tmp_path: Path) -> None:
    """The committee loads in the engine, and each expert's option probabilities came nearer to its own culture's shares."""
    run(base, tmp_path, opinions(), steps=60)
    engine = Engine(llama.folder, committee=tmp_path / "out", page_size=8, kv_cache_tokens=2048)
    assert engine.experts == ["north-shore", "south"]
    assert [engine.expert(name).culture for name in engine.experts] == ["North Shore", "South"]
    from whispers_engine.records import prompt

    record = read_records(tmp_path / "data.jsonl").records[1]
    question, letters = prompt(record)
    chances = engine.score(question, letters).logprobs.softmax(-1)
    want = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    assert (chances - want).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["embeddings", "kv"])
def test_peft_reads_the_result(llama: Tiny, base: Base, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    run(base, tmp_path, opinions(), kind=kind, placement="prefix", steps=3)
    engine = Engine(llama.folder, committee=tmp_path / "out", page_size=8, kv_cache_tokens=2048)
    context, header = engine.chat.split("what do people eat?")
    got = engine.score((context, header), [[token] for token in range(llama.vocab)], experts=["south"]).logprobs[0]
    peft = PeftModel.from_pretrained(make_tiny("llama", tmp_path / "base").hf, tmp_path / "out" / "south")
    with torch.no_grad():
        want = peft(torch.tensor([context + header])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_record_says_what_it_was_trained_on(base: Base, tmp_path: Path) -> None:
    run(base, tmp_path, opinions(), steps=20, licence="CC BY 4.0", dev_share=0.3, patience=None)
    expert = Expert.load(tmp_path / "out" / "south")
    source = read_records(tmp_path / "data.jsonl")
    assert expert.record["data"] == {"file": "data.jsonl", "sha256": source.sha256, "licence": "CC BY 4.0"}
    assert expert.record["settings"]["steps"] == 20 and expert.record["settings"]["virtual_tokens"] == 4
    assert [point["step"] for point in expert.record["curve"]] == list(range(2, 21, 2))
    assert all(point["dev"] > 0 for point in expert.record["curve"])
    assert expert.base == base.fingerprint
    assert not (tmp_path / "out.training").exists()


def test_stops_who_gets_worse_and_keeps_what_was_not(base: Base, tmp_path: Path) -> None:
    """At an absurd rate what is held out gets worse."""
    how: dict[str, Any] = {
        "steps": 200, "rate": 3.0, "decay": "none", "warmup": 0.0, "dev_share": 0.3, "evaluate_every": 1,
    }  # fmt: skip
    trained = run(base, tmp_path, opinions(16), patience=3, **how)
    source = read_records(tmp_path / "data.jsonl")
    patient = train(base, source, tmp_path / "patient", Settings(batch=4, virtual_tokens=4, patience=5, **how))
    for index, (expert, found) in enumerate(zip(trained.experts, trained.summary["experts"], strict=True)):
        curve = [point["dev"] for point in expert.record["curve"]]
        assert found["steps"] == len(curve) < 200
        assert found["steps"] - found["kept_step"] == 3
        assert found["dev_loss"] == curve[found["kept_step"] - 1] < min(curve[found["kept_step"] :])
        assert patient.summary["experts"][index]["steps"] > found["steps"]  # patience is what stopped it
        again = train(
            base, source, tmp_path / f"again-{index}",
            Settings(batch=4, virtual_tokens=4, patience=3, **{**how, "steps": found["kept_step"]}),
        )  # fmt: skip
        assert again.experts[index].embeddings.equal(expert.embeddings)  # what is written are the weights of that step


def test_shared_prompt_is_where_all_start(base: Base, tmp_path: Path) -> None:
    trained = run(base, tmp_path, opinions(), shared_steps=20, steps=1, rate=1e-9, warmup=0.0)
    one, other = (expert.embeddings for expert in trained.experts)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)  # a rate of next to nothing: neither has moved from it
    assert len(trained.experts[0].record["shared_curve"]) == 10


def test_shared_prompt_alone(base: Base, tmp_path: Path) -> None:
    """What those start from, as the only expert, that speaks for no culture."""
    how = {"virtual_tokens": 4, "batch": 4, "shared_steps": 20, "dev_share": 0.0}
    source = read_records(write(tmp_path / "data.jsonl", opinions()))
    alone = train(base, source, tmp_path / "alone", Settings(steps=0, **how))
    (expert,) = Committee.load(tmp_path / "alone").experts
    assert (expert.name, expert.culture, expert.record["steps"]) == ("shared", None, 20)
    assert [found["name"] for found in alone.summary["experts"]] == ["shared"]
    after = train(base, source, tmp_path / "after", Settings(steps=1, rate=1e-9, warmup=0.0, **how))
    again = train(base, source, tmp_path / "again", Settings(steps=1, init=tmp_path / "alone", rate=1e-9, **how))
    assert len(after.experts) == len(again.experts) == 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("kind", "placement"), [("embeddings", "detached"), ("kv", "prefix")])
def test_goes_on_where_it_was(base: Base, tmp_path: Path, kind: str, placement: str) -> None:
    source = read_records(write(tmp_path / "data.jsonl", opinions()))
    settings = Settings(
        steps=12, shared_steps=8, batch=3, virtual_tokens=4, kind=kind, placement=placement, dev_share=0.3,
        checkpoint_seconds=0.0, orders=2,
    )  # fmt: skip
    whole = train(base, source, tmp_path / "whole", settings)
    seen: list[tuple[str, int]] = []
    kills = iter([("shared", 5), ("experts", 4), ("experts", 11)])
    at = next(kills)

    def progress(now: Progress) -> None:
        seen.append((now.phase, now.step))
        if seen[-1] == at:
            raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            train(base, source, tmp_path / "out", settings, progress)
        at = next(kills, ("", 0))
    again = train(base, source, tmp_path / "out", settings, progress)
    for one, other in zip(whole.experts, again.experts, strict=True):
        assert one.embeddings.equal(other.embeddings)
        assert one.record == other.record
    # A step that ended between two checkpoints is taken again, no other.
    assert len(seen) == 20 + 3


COMMAND = "import torch; torch.set_num_threads(1)\nfrom whispers_engine.cli.main import run; import sys; sys.argv[0] = 'whispers'; run()"


@pytest.mark.parametrize("placement", ["suffix", "detached"])
def test_killed_in_the_middle_it_ends_with_the_same_bits(llama: Tiny, tmp_path: Path, placement: str) -> None:
    write(tmp_path / "data.jsonl", opinions())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}

    def start(out: str, **how: Any) -> subprocess.Popen[bytes]:
        arguments = [
            "train", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / out), "--model", str(llama.folder),
            "--dtype", "float32", "--placement", placement, "--steps", "300", "--batch", "3", "--virtual-tokens", "4",
            "--checkpoint-seconds", "0", "--cache-mb", "0", "--json",
        ]  # fmt: skip
        return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], env=environment, **how)

    assert start("whole", stdout=subprocess.DEVNULL).wait(timeout=120) == 0
    process = start("out", stdout=subprocess.PIPE)
    state = tmp_path / "out.training" / "state.safetensors"
    deadline = time.monotonic() + 60
    while not state.is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    done = step_of(state)
    assert 0 < done < 300
    process = start("out", stdout=subprocess.PIPE)
    assert process.wait(timeout=120) == 0
    for name in ("north-shore", "south"):
        one, other = (load_file(tmp_path / out / name / "adapter_model.safetensors") for out in ("whole", "out"))
        assert one["prompt_embeddings"].equal(other["prompt_embeddings"])


def step_of(state: Path) -> int:
    from safetensors import safe_open

    with safe_open(state, framework="pt") as file:
        return int(json.loads(file.metadata()["state"])["step"])


def test_other_settings_do_not_continue_a_run(base: Base, tmp_path: Path) -> None:
    source = read_records(write(tmp_path / "data.jsonl", opinions()))

    def stop(now: Progress) -> None:
        raise Killed

    settings = {"steps": 5, "virtual_tokens": 4, "checkpoint_seconds": 0.0}
    for _ in range(2):  # a first step is done and checkpointed once a second begins
        with pytest.raises(Killed):
            train(base, source, tmp_path / "out", Settings(**settings), lambda now: stop(now) if now.step > 1 else None)
    with pytest.raises(WhispersError, match=r"of a run with rate 0\.01, and this one has 0\.02"):
        train(base, source, tmp_path / "out", Settings(**settings, rate=0.02))
    (tmp_path / "out.training" / "state.safetensors").write_bytes(b"not this")
    with pytest.raises(WhispersError, match=r"state\.safetensors: not a checkpoint"):
        train(base, source, tmp_path / "out", Settings(**settings))


@pytest.mark.parametrize(
    "head",
    [
        "{}",
        "[]",
        "null",
        '"state"',
        '{"version": 1, "key": null}',
        '{"version": 1, "key": []}',
        '{"version": 1, "key": {}}',
    ],
)
def test_checkpoints_that_are_none(tmp_path: Path, head: str) -> None:
    save_file({"value": torch.zeros(1)}, tmp_path / "state.safetensors", metadata={"state": head})
    with pytest.raises(
        WhispersError, match=r"state\.safetensors: not a checkpoint: .*; accepted: one that a training run"
    ):
        checkpoint.load(tmp_path, {"data": "x"})


def test_another_folder_to_start_from_does_not_continue_a_run(llama: Tiny, base: Base, tmp_path: Path) -> None:
    source = read_records(write(tmp_path / "data.jsonl", opinions()))
    settings = Settings(steps=4, init=tmp_path / "init", checkpoint_seconds=0.0, dev_share=0.0)

    def put(seed: int, m: int) -> None:
        soft_prompt(llama, m, seed, "any", "suffix").save(tmp_path / "init")

    def stop(now: Progress) -> None:
        if now.step > 2:
            raise Killed

    put(1, 4)
    whole = train(base, source, tmp_path / "whole", settings)
    with pytest.raises(Killed):
        train(base, source, tmp_path / "out", settings, stop)
    for seed, m in ((2, 4), (1, 7)):
        put(seed, m)
        with pytest.raises(WhispersError, match=r"of a run with init_sha256 '\w+', and this one has '\w+'"):
            train(base, source, tmp_path / "out", settings)
    put(1, 4)
    again = train(base, source, tmp_path / "out", settings)
    assert all(a.embeddings.equal(b.embeddings) for a, b in zip(again.experts, whole.experts, strict=True))


def test_another_chat_template_does_not_continue_a_run(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_records(write(tmp_path / "data.jsonl", opinions()))

    settings = Settings(steps=3, virtual_tokens=4, checkpoint_seconds=0.0)

    def stop(now: Progress) -> None:
        if now.step > 1:
            raise Killed

    with pytest.raises(Killed):
        train(base, source, tmp_path / "out", settings, stop)
    monkeypatch.setitem(vars(base.chat), "content_hash", "another")
    with pytest.raises(WhispersError, match=r"of a run with prompting '\w+', and this one has 'another'"):
        train(base, source, tmp_path / "out", settings)


def test_an_output_that_appeared_is_not_replaced(base: Base, tmp_path: Path) -> None:
    source, out = read_records(write(tmp_path / "data.jsonl", opinions())), tmp_path / "out"
    settings = Settings(steps=3, virtual_tokens=4)
    whole = train(base, source, tmp_path / "whole", settings)

    def appear(now: Progress) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("mine")

    with pytest.raises(
        WhispersError, match=r"out: appeared during the training, and is not replaced; accepted: the same"
    ):
        train(base, source, out, settings, appear)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    out.rename(tmp_path / "moved")
    steps: list[Progress] = []
    again = train(base, source, out, settings, steps.append)
    assert not steps and not (tmp_path / "out.training").exists()  # all is done already
    assert all(a.embeddings.equal(b.embeddings) for a, b in zip(again.experts, whole.experts, strict=True))
    assert len(Committee.load(out).experts) == 2


def break_gradient(monkeypatch: pytest.MonkeyPatch, at: int, expert: int, wrong: float = math.nan) -> None:
    """One value of one expert's gradient, at one step from 1."""
    right, calls = Stepper.gradient, itertools.count(1)

    def gradient(self: Stepper, value: Tensor, drawn: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
        losses, found = right(self, value, drawn)
        if next(calls) == at:
            found[expert].view(-1)[0] = wrong
        return losses, found

    monkeypatch.setattr(Stepper, "gradient", gradient)


@pytest.mark.parametrize(("kind", "placement"), [("embeddings", "suffix"), ("kv", "detached")])
@pytest.mark.parametrize("dev_share", [0.0, 0.3])
@pytest.mark.parametrize(("wrong", "clip"), [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, None)])
def test_a_gradient_that_is_not_finite_ends_one_expert_alone(
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    placement: str,
    dev_share: float,
    wrong: float,
    clip: float | None,
) -> None:
    source = read_records(write(tmp_path / "data.jsonl", opinions(12)))
    settings = Settings(
        steps=12, batch=3, virtual_tokens=4, kind=kind, placement=placement, dev_share=dev_share, evaluate_every=2,
        patience=None, checkpoint_seconds=0.0, clip=clip,
    )  # fmt: skip
    whole = train(base, source, tmp_path / "whole", settings)
    break_gradient(monkeypatch, 7, 0, wrong)
    seen: list[Progress] = []

    def progress(now: Progress) -> None:
        seen.append(now)
        if len(seen) == 9:
            raise Killed

    with pytest.raises(Killed):
        train(base, source, tmp_path / "out", settings, progress)
    trained = train(base, source, tmp_path / "out", settings, progress)
    assert [now.active for now in seen][5:9] == [2, 1, 1, 1]
    (broken, fine), (found, other) = trained.experts, trained.summary["experts"]
    assert fine.embeddings.equal(whole.experts[1].embeddings) and fine.record == whole.experts[1].record
    assert other == whole.summary["experts"][1] and other["broken_step"] is None
    assert (found["steps"], found["broken_step"], broken.record["broken_step"]) == (6, 7, 7)
    assert broken.record["curve"] == whole.experts[0].record["curve"][:3]
    assert 0 < found["kept_step"] <= 6 and broken.embeddings.isfinite().all()
    assert found["dev_loss"] == (broken.record["curve"][found["kept_step"] // 2 - 1]["dev"] if dev_share else None)
    assert trained.summary["examples"] == 12 * 3 + 6 * 3
    Committee.load(tmp_path / "out")


def test_weights_that_are_not_finite(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the latest look are the result: to the bit what a run of so many steps writes."""
    how: dict[str, Any] = {"decay": "none", "warmup": 0.0, "evaluate_every": 3}
    (tmp_path / "short").mkdir()
    short = run(base, tmp_path / "short", opinions(), steps=3, **how)
    right = AdamW.step

    def step(self: AdamW, gradient: Tensor, rate: float, step: int, active: Tensor) -> None:
        right(self, gradient, rate, step, active)
        if step == 4:
            self.value[1, 0, 0] = math.inf

    monkeypatch.setattr(AdamW, "step", step)
    trained = run(base, tmp_path, opinions(), steps=9, **how)
    found = trained.summary["experts"][1]
    assert (found["steps"], found["kept_step"], found["broken_step"]) == (4, 3, 5)
    assert trained.experts[1].embeddings.equal(short.experts[1].embeddings)


def test_an_expert_of_which_nothing_is_left_is_named(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradient(monkeypatch, 1, 1)
    for _ in range(2):  # the second from the checkpoint
        with pytest.raises(WhispersError, match=r"^south: no weights to keep, losses or gradients were not finite"):
            run(base, tmp_path, opinions(), steps=4)
    assert not (tmp_path / "out").exists()


def test_bfloat16_learns_too(llama: Tiny, tmp_path: Path) -> None:
    trained = run(Base.load(llama.folder, dtype="bfloat16"), tmp_path, opinions(), evaluate_every=1)
    lowered = [expert["first_loss"] - expert["last_loss"] for expert in trained.summary["experts"]]
    assert max(lowered) > 0.03, trained.summary


def test_engine_lends_its_base(llama: Tiny, base: Base, tmp_path: Path) -> None:
    source = read_records(write(tmp_path / "data.jsonl", opinions()))
    settings = Settings(steps=2, virtual_tokens=4)
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=2048)
    one = train(engine, source, tmp_path / "one", settings)
    other = train(base, source, tmp_path / "other", settings)
    for a, b in zip(one.experts, other.experts, strict=True):
        assert a.embeddings.equal(b.embeddings)
    assert Committee.load(tmp_path / "one").fingerprint == engine.fingerprint
