"""`bench decode`, `prefill`, `throughput` on a base: the same function on all sides, what is printed and refused. No test reads a time."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

from tests.engine.conftest import Bench, Tiny, make_tiny
from tests.engine.test_pull import make_base, write_gguf
from whispers_engine import WhispersError
from whispers_engine.bench import (
    base,
    check,
    committee,
    contest,
    field,
    gguf_file,
    hf,
    judge,
    llama,
    llamacpp,
    work,
)
from whispers_kernels import reference


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny Llama that GGUF can say: default rope, no biases."""
    made = make_base(tmp_path_factory.mktemp("plain"), tied=False)
    made.hf.save_pretrained(made.folder)
    return made


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $WHISPERS_HOME, and no llama.cpp but a test's own."""
    monkeypatch.setenv("WHISPERS_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    return tmp_path / "home"


@pytest.fixture
def prompt(plain: Tiny) -> llamacpp.Prompt:
    return field.random_prompt(plain.hf.get_input_embeddings().weight.detach(), experts=3, context=40)


def whole(plain: Tiny, prompt: llamacpp.Prompt, row: int, answer: list[int]) -> torch.Tensor:
    """What plain transformers finds behind the prompt and every token of an answer but the last, each sequence on its own."""
    assert prompt.soft_ids is not None
    ids = [*prompt.context, *prompt.soft_ids[row], *prompt.header, *answer[:-1]]
    with torch.no_grad():
        return plain.hf(torch.tensor([ids])).logits[0, -len(answer) :].log_softmax(-1)


# --- GGUF ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_says_what_the_base_came_from(tied: bool, tmp_path: Path, home: Path) -> None:
    """Tensors and metadata are those that llama.cpp's own converter writes."""
    made = make_base(tmp_path / "tiny", tied)
    made.hf.save_pretrained(made.folder)
    write_gguf(made, tmp_path / "theirs.gguf")
    path = gguf_file.as_gguf(made.folder, "f32")
    assert path.parent == home / "gguf" and list(path.parent.iterdir()) == [path]
    ours, theirs = GGUFReader(path), GGUFReader(tmp_path / "theirs.gguf")
    want = {tensor.name: tensor.data for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(want)
    assert all(np.array_equal(tensor.data, want[tensor.name]) for tensor in ours.tensors)
    own = {"general.name", "general.license", "tokenizer.ggml.unknown_token_id"}  # of a folder that was never pulled
    for key, value in theirs.fields.items():
        if key not in own and not key.startswith("GGUF."):
            found = ours.fields[key].contents()
            assert found == ("gpt-2" if key == "tokenizer.ggml.pre" else value.contents()), key


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_gguf_rounds_matrices_only(kind: str, plain: Tiny) -> None:
    exact = {t.name: t.data for t in GGUFReader(gguf_file.as_gguf(plain.folder, "f32")).tensors}
    for tensor in GGUFReader(gguf_file.as_gguf(plain.folder, kind)).tensors:
        value, want = dequantize(tensor.data, tensor.tensor_type), torch.from_numpy(exact[tensor.name].copy())
        if want.dim() == 1:
            assert np.array_equal(value, want)
        elif kind == "bf16":
            assert np.array_equal(value, want.bfloat16().float())
        else:
            blocks = want.reshape(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 127  # stored as float16, whence the 7 %
            assert bool(((torch.from_numpy(value).reshape(-1, 32) - blocks).abs() <= 0.57 * step).all())


def test_gguf_whole_or_not_at_all(plain: Tiny, home: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf_file.as_gguf(plain.folder, "bf16", stop)
    assert list((home / "gguf").iterdir()) == []
    path = gguf_file.as_gguf(plain.folder, "bf16")
    assert gguf_file.as_gguf(plain.folder, "bf16", stop) == path  # kept


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_base_that_gguf_cannot_say(family: str, tmp_path: Path) -> None:
    with pytest.raises(WhispersError, match="accepted"):
        gguf_file.as_gguf(make_tiny(family, tmp_path / family).folder, "bf16")


# --- contenders ------------------------------------------------------------------------------------------------------------------------


def test_transformers_with_a_repeated_context_is_transformers(plain: Tiny, prompt: llamacpp.Prompt) -> None:
    model = hf.Transformers(plain.hf)
    decoded = model.decode(prompt, 3, 5)
    assert len(decoded.step_ms) == 4
    assert model.decode(prompt, 3, 5).tokens == decoded.tokens  # what the first run added is gone
    found = model.logprobs(prompt, decoded.tokens)
    for row, tokens in enumerate(decoded.tokens):
        want = whole(plain, prompt, row, tokens)
        torch.testing.assert_close(found[row], want, atol=1e-4, rtol=0)
        assert want.argmax(-1).tolist() == tokens
    assert model.prefill(prompt.context)[0] == int(plain.hf(torch.tensor([prompt.context])).logits[0, -1].argmax())


def test_ours_is_transformers_and_runs_past_end_tokens(plain: Tiny, prompt: llamacpp.Prompt) -> None:
    ours = committee.Committee(plain.folder, prompt.soft, dtype="float32", kv_cache_tokens=1024)
    assert ours.engine.model.config.eos_ids == ()
    decoded = ours.decode(prompt, 3, 5)
    assert decoded.tokens == hf.Transformers(plain.hf).decode(prompt, 3, 5).tokens and len(decoded.step_ms) == 4
    for _ in range(2):  # a second time nothing of it is known, either
        assert ours.prefill(prompt.context)[0] == hf.Transformers(plain.hf).prefill(prompt.context)[0]
    held = ours.memory(prompt, 3, 5)
    config, page = ours.engine.model.config, ours.engine.pool.page_size
    parameters = sum(weight.nbytes for weight in plain.hf.parameters())
    assert parameters <= held["weights"] <= 1.01 * parameters
    least = work.Work(config, 4, held["weights"])
    assert held["context"] == -(-40 // page) * page * least.position
    assert held["private"] == 3 * -(-(16 + 4) // page) * page * least.position


def test_the_least_bytes_are_the_weights() -> None:
    shape = llama.SHAPES["tiny"]
    weights = llama.random_weights(shape, torch.float32, torch.device("cpu"))
    assert weights.nbytes > llama.weight_bytes(weights)  # of the embeddings a step reads its rows alone
    least = work.Work(shape.config(), 4, weights.nbytes)
    assert least.weights == llama.weight_bytes(weights)
    assert least.prefill(1)[1] == least.decode(1, 1, 0)[1]
    one, two = (least.prefill(tokens)[1] for tokens in (1, 2))
    layers = least.config.num_layers
    assert (layers - 1) / layers * one < two - one + 2 * least._head < one + 2 * least._head


class Fake(ModuleType):
    """llama.cpp's interface over transformers: cells that sequences share, batches with positions, logits of the rows that want them.

    Only what a cell's sequences and position say is visible, as there; so a wrong position, sequence or flag shows in the logits.
    """

    LLAMA_FLASH_ATTN_TYPE_ENABLED, LLAMA_FLASH_ATTN_TYPE_DISABLED, GGML_TYPE_F32 = 1, 0, 0

    def __init__(self, model: Any):
        super().__init__("llama_cpp")
        self.model, self.cells, self.rows = model, {}, []
        self.llama_log_callback = self.llama_get_memory = self.llama_model_get_vocab = lambda value: value
        self.llama_log_set = self.llama_memory_clear = lambda *_: self.cells.clear()
        self.llama_backend_init = self.llama_free = self.llama_batch_free = self.llama_model_free = lambda *_: None
        self.llama_print_system_info = lambda: b"CPU : FAKE = 1 | "
        self.llama_model_default_params = self.llama_context_default_params = lambda: type("Params", (), {})()
        self.llama_model_load_from_file = lambda path, params: Path(path.decode()).is_file()
        self.llama_init_from_model = lambda handle, params: params
        self.llama_vocab_n_tokens = lambda vocab: model.config.vocab_size

    def llama_batch_init(self, size: int, embd: int, sequences: int) -> Any:
        batch = type("Batch", (), {"n_tokens": 0})()
        for name, kind in (("token", ctypes.c_int32), ("pos", ctypes.c_int32), ("n_seq_id", ctypes.c_int32)):
            setattr(batch, name, ctypes.cast((kind * size)(), ctypes.POINTER(kind)))
        batch.logits = ctypes.cast((ctypes.c_int8 * size)(), ctypes.POINTER(ctypes.c_int8))
        batch.seq_id = [ctypes.cast((ctypes.c_int32 * 1)(), ctypes.POINTER(ctypes.c_int32)) for _ in range(size)]
        return batch

    def llama_memory_seq_cp(self, memory: Any, source: int, target: int, begin: int, end: int) -> None:
        self.cells |= {(target, at): token for (row, at), token in self.cells.items() if row == source}

    def llama_memory_seq_rm(self, memory: Any, sequence: int, begin: int, end: int) -> None:
        self.cells = {key: token for key, token in self.cells.items() if key[0] != sequence or key[1] < begin}

    def llama_decode(self, context: Any, batch: Any) -> int:
        if batch.n_tokens > context.n_batch:
            return 1
        wanted = []
        for row in range(batch.n_tokens):
            key = (batch.seq_id[row][0], batch.pos[row])
            self.cells[key] = batch.token[row]
            wanted += [key] * batch.logits[row]
        out = []
        for sequence, position in wanted:
            ids = [self.cells[sequence, at] for at in range(position + 1)]
            with torch.no_grad():
                out.append(self.model(torch.tensor([ids])).logits[0, -1])
        self.rows = torch.stack(out).numpy() if out else None
        return 0

    def llama_get_logits(self, context: Any) -> Any:
        return self.rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def test_llama_cpp_is_asked_for_the_same(plain: Tiny, prompt: llamacpp.Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", Fake(plain.hf))
    model = llamacpp.LlamaModel(plain.folder / "model.safetensors")
    context = llamacpp.LlamaCpp(model, llamacpp.Setting(flash=False, ubatch=16), 3, 200)  # chunks of the context
    want = hf.Transformers(plain.hf).decode(prompt, 3, 5).tokens
    for _ in range(2):
        assert context.decode(prompt, 3, 5).tokens == want
    assert context.prefill(prompt.context)[0] == hf.Transformers(plain.hf).prefill(prompt.context)[0]
    assert context.decode(prompt, 3, 5).tokens == want
    context.close()
    model.close()
    with pytest.raises(llamacpp.Unavailable, match="does not load"):
        llamacpp.LlamaModel(plain.folder / "no.gguf")


def test_the_real_llama_cpp(plain: Tiny, prompt: llamacpp.Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llama_cpp")
    pytest.importorskip("llama_cpp")
    model = llamacpp.LlamaModel(gguf_file.as_gguf(plain.folder, "f32"))
    context = llamacpp.LlamaCpp(model, llamacpp.Setting(flash=False), 3, 200, exact=True)
    first = hf.Transformers(plain.hf).first(prompt, 3).log_softmax(-1)
    torch.testing.assert_close(context.first(prompt, 3).log_softmax(-1), first, atol=1e-3, rtol=0)
    assert context.decode(prompt, 3, 5).tokens == hf.Transformers(plain.hf).decode(prompt, 3, 5).tokens
    context.close()
    model.close()


# --- what is printed -------------------------------------------------------------------------------------------------------------------


def arguments(command: str, tiny: Tiny, *more: str) -> tuple[str, ...]:
    sizes = {
        "decode": ("--experts", "1,3", "--steps", "3"),
        "prefill": (),
        "throughput": ("--experts", "1,3", "--new-tokens", "4"),
    }[command]
    shared = ("--context", "40", "--dtype", "float32", "--rounds", "2")
    return ("bench", command, "--device", "cpu", "--model", str(tiny.folder), *sizes, *shared, *more)


def test_decode_prints_the_documented_object(bench: Bench, plain: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "times.svg"
    status, printed = bench(*arguments("decode", plain, "--json", "--plot", str(plot)))
    report = json.loads(printed)
    assert status == 0 and report["ok"] and plot.read_text().lstrip().startswith("<?xml")
    assert {"device", "versions", "command", "ceilings", "results", "impl", "dtype", "quantization"} <= report.keys()
    assert [(result["experts"], result["context"]) for result in report["results"]] == [(1, 40), (3, 40)]
    for result in report["results"]:
        assert set(result["peers"]) == {"transformers-fp32", "transformers-bf16"} and result["check"]["error"] < 1e-3
        assert set(result["left_out"]) == {"llama.cpp-f32", "llama.cpp-bf16", "llama.cpp-q8_0"}
        assert all("pip install 'whispers-engine[llama]'" in reason for reason in result["left_out"].values())
        for peer in result["peers"].values():
            assert peer["ratio"] == pytest.approx(peer["ms"] / result["ours_ms"], rel=1e-3)
            rounds = peer["ratio_of_rounds"]
            assert rounds["low"] <= rounds["median"] <= rounds["high"]
        best = result["against"]["transformers"]
        assert best["ratio"] == min(peer["ratio"] for peer in result["peers"].values())
        assert set(result["against"]) == {"transformers"}
        assert result["tokens_equal"]["transformers-fp32"] == 1.0
        assert result["floor_share"] == pytest.approx(result["floor_ms"] / result["ours_ms"], rel=1e-3)
        assert result["memory"]["total"] == sum(result["memory"][name] for name in ("weights", "context", "private"))
        assert result["dtype"] == "float32"
    one, three = report["results"]
    assert one["over_one_expert"] == 1.0
    assert three["over_one_expert"] == pytest.approx(three["ours_ms"] / one["ours_ms"], rel=1e-3)


def test_llama_cpp_in_the_field(bench: Bench, plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both settings run, the faster one is the peer."""
    monkeypatch.setitem(sys.modules, "llama_cpp", Fake(plain.hf))
    for command in ("decode", "prefill"):
        status, printed = bench(*arguments(command, plain, "--vs", "llama.cpp-f32,transformers-bf16", "--json"))
        report = json.loads(printed)
        assert status == 0 and report["llama.cpp"] == "FAKE = 1"
        for result in report["results"]:
            peer = result["peers"]["llama.cpp-f32"]
            assert {name.split(",")[0] for name in peer["settings"]} == {"flash attention on", "flash attention off"}
            assert peer["ms"] == min(peer["settings"].values()) == peer["settings"][peer["setting"]]
            assert result["against"]["llama.cpp"] == {"peer": "llama.cpp-f32", "ratio": peer["ratio"]}
    status, printed = bench(*arguments("prefill", plain, "--vs", "llama.cpp-f32"))
    assert status == 0 and "times as fast as llama.cpp (llama.cpp-f32, flash attention" in printed


def test_throughput_is_of_whole_answers(bench: Bench, plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody begins from nothing in every round: the context is computed as often as somebody runs."""
    monkeypatch.setitem(sys.modules, "llama_cpp", Fake(plain.hf))
    begun = {"ours": 0, "transformers": 0, "llama.cpp": 0}

    def counted(kind: type, name: str, method: str) -> None:
        plain_method = getattr(kind, method)

        def count(self: Any, *args: Any) -> Any:
            begun[name] += 1
            return plain_method(self, *args)

        monkeypatch.setattr(kind, method, count)

    counted(committee.Committee, "ours", "forget")
    counted(hf.Transformers, "transformers", "_repeated")
    counted(llamacpp.LlamaCpp, "llama.cpp", "forget")
    status, printed = bench(*arguments("throughput", plain, "--vs", "transformers-fp32,llama.cpp-f32", "--json"))
    report = json.loads(printed)
    assert status == 0 and report["ok"]
    assert [(result["experts"], result["new_tokens"]) for result in report["results"]] == [(1, 4), (3, 4)]
    for result in report["results"]:
        assert result["op"] == "answer" and set(result["peers"]) == {"transformers-fp32", "llama.cpp-f32"}
        assert result["tokens_s"] == pytest.approx(result["experts"] * 4e3 / result["ours_ms"], rel=1e-3)
    assert begun["ours"] == 2 * 3 and begun["llama.cpp"] == 2 * 2 * 3 and begun["transformers"] >= 2 * 3
    status, printed = bench(*arguments("throughput", plain, "--vs", "transformers-fp32"))
    assert status == 0 and "whole answers" in printed and "tokens/s" in printed


def test_a_peer_that_computes_another_function_is_left_out(
    bench: Bench, plain: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_base(tmp_path / "other", tied=True)  # another head
    monkeypatch.setitem(sys.modules, "llama_cpp", Fake(other.hf))
    status, printed = bench(*arguments("decode", plain, "--vs", "llama.cpp-f32", "--json"))
    for result in json.loads(printed)["results"]:
        assert status == 0 and result["peers"] == {} and result["against"] == {}
        assert len(result["left_out"]) == 2
        assert all(reason.startswith("wrong: error") for reason in result["left_out"].values())


@pytest.mark.parametrize("command", ["decode", "prefill", "throughput"])
def test_a_wrong_engine_is_not_timed(command: str, bench: Bench, plain: Tiny, planted: Callable[..., None]) -> None:
    planted("silu_mul", lambda gate_up: reference.silu_mul(gate_up) * 1.1)
    status, printed = bench(*arguments(command, plain, "--impl", "planted", "--json"))
    assert status == 1
    for result in json.loads(printed)["results"]:
        assert not result["ok"] and not {"ours_ms", "peers", "floor_share"} & result.keys()
    status, printed = bench(*arguments(command, plain, "--impl", "planted"))
    assert status == 1 and "WRONG" in printed and "%" not in printed


def test_int8_is_held_to_what_its_weights_say(bench: Bench, plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """What int8 loses is no room for other errors: experts that are swapped show."""
    int8 = ("--impl", "cpp", "--quantization", "int8", "--vs", "transformers-bf16", "--json")
    status, printed = bench(*arguments("decode", plain, *int8))
    assert status == 0
    for result in json.loads(printed)["results"]:
        assert result["check"]["error"] < 0.01 and result["check"]["rms"] <= result["check"]["error"]
    made = committee.Committee.__init__

    def swapped(self: Any, model: Any, soft: torch.Tensor, **settings: Any) -> None:
        made(self, model, soft.roll(1, 0), **settings)

    monkeypatch.setattr(committee.Committee, "__init__", swapped)
    status, printed = bench(*arguments("decode", plain, *int8))
    assert status == 1 and not any(result["ok"] for result in json.loads(printed)["results"])


def test_the_mean_error_counts_too() -> None:
    """Errors that are each no larger than the largest of transformers' are too many."""
    exact = torch.randn(4, 8, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    plain = exact.clone()
    plain[0, 0] += 0.05
    tokens = exact.argmax(-1)
    truth = exact.gather(-1, tokens[..., None])[..., 0]
    for off, ok in ((0.0, True), (0.015, True), (0.03, False)):
        found = check.judge_tokens(tokens.tolist(), (truth + off).tolist(), exact, plain, torch.bfloat16)
        assert found["error"] <= found["budget"] and found["ok"] == ok


@pytest.mark.parametrize("command", ["decode", "prefill", "throughput"])
def test_what_was_timed_is_judged(command: str, bench: Bench, plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that does something else than the one that was checked: ours is not reported, a peer is left out."""
    checks = {"decode": 1, "throughput": 1, "prefill": 0}[command]  # of a shape, before anything is timed
    sizes = () if command == "prefill" else ("--experts", "3")
    what = "prefill" if command == "prefill" else "decode"

    def lazy(patch: pytest.MonkeyPatch, kind: type, right: int) -> None:
        done, runs = getattr(kind, what), 0

        def run(self: Any, *given: Any) -> Any:
            nonlocal runs
            runs += 1
            found = done(self, *given)
            if runs <= right:
                return found
            if command == "prefill":
                return (found[0] + 1) % 200, found[1]
            found.tokens = [[0] * len(row) for row in found.tokens]
            return found

        patch.setattr(kind, what, run)

    vs = ("--vs", "transformers-fp32", "--json")
    with monkeypatch.context() as patch:
        lazy(patch, committee.Committee, checks)
        status, printed = bench(*arguments(command, plain, *sizes, *vs))
        (result,) = json.loads(printed)["results"]
        assert status == 1 and not result["ok"] and not {"ours_ms", "peers", "against"} & result.keys()
        assert result["check"]["passed_over_timed"] > 2 * result["check"]["budget"]
    lazy(monkeypatch, hf.Transformers, checks)
    status, printed = bench(*arguments(command, plain, *sizes, *vs))
    (result,) = json.loads(printed)["results"]
    assert status == 0 and result["ok"] and result["peers"] == {} and result["against"] == {}
    assert "wrong while it was timed" in result["left_out"]["transformers-fp32"]


def test_runs_of_one_prompt_are_judged_once() -> None:
    seen = judge.Outcomes()
    for tokens in ([[1, 2], [3, 4]], [[1], [3]], [[1, 2, 5], [3, 4, 6]], [[1, 9], [3, 4]], [[1], [3]]):
        seen.add("a", tokens)
    judged = []
    assert seen.worst("a", lambda tokens: judged.append(tokens) or float(len(tokens[0]))) == 3.0  # type: ignore[func-returns-value]
    assert judged == [[[1, 2, 5], [3, 4, 6]], [[1, 9], [3, 4]]]


def test_refusals(bench: Bench, plain: Tiny) -> None:
    for more in (
        ("--vs", "llama"),
        ("--experts", "0"),
        ("--context", "0"),
        ("--experts", "one"),
        ("--rounds", "0"),
        ("--steps", "1"),
        ("--dtype", "int4"),
        ("--impl", "cuda"),
        ("--quantization", "int2"),
        ("--model", "no-such-base"),
        ("--plot", "times.txt"),
    ):
        status, printed = bench(*arguments("decode", plain, *more))
        assert status == 1 and ("accepted" in printed or more[0] == "--model"), more
    for more in (("--new-tokens", "1"), ("--vs", "llama"), ("--experts", "0")):
        status, printed = bench(*arguments("throughput", plain, *more))
        assert status == 1 and "accepted" in printed, more


def test_ratios_are_of_medians_and_round_by_round() -> None:
    times = {"ours": [[1.0, 1.0, 9.0], [2.0], [4.0]], "a": [[4.0], [4.0], [4.0]], "b": [[3.0], [5.0], [7.0]]}
    settings = {"a": ("peer", "slow"), "b": ("peer", "fast")}
    found = contest.compare({"ours": times["ours"], "b": times["b"], "a": times["a"]}, settings)
    assert found["ours_ms"] == 2.0 and set(found["peers"]) == {"peer"}
    peer = found["peers"]["peer"]
    assert (peer["ms"], peer["ratio"], peer["setting"]) == (4.0, 2.0, "slow")
    assert peer["settings"] == {"fast": 5.0, "slow": 4.0}
    assert peer["ratio_of_rounds"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    assert (found["rounds_ms"], peer["rounds_ms"]) == ([1.0, 2.0, 4.0], [4.0, 4.0, 4.0])
    assert contest.hardest(found["peers"], ["none"]) is None
    assert base.peers_of(["llama.cpp"], torch.bfloat16) == ["llama.cpp-bf16", "llama.cpp-q8_0"]
