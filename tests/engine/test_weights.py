"""A base's files: shards, tied heads, dtypes and old configs make no difference; the fingerprint tells bases apart, not files."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.engine.conftest import LLAMA3_ROPE, Tiny, make_tiny, token_ids
from tests.engine.oracle import oracle_logprobs
from whispers_engine import Engine, SamplingParams
from whispers_engine.config import ModelConfig
from whispers_engine.weights import Checkpoint, load_weights

TOLERANCE = 1e-4


def fingerprint(folder: Path) -> str:
    return Checkpoint(folder).fingerprint(ModelConfig.load(folder))


def scores(tiny: Tiny, folder: Path) -> torch.Tensor:
    """The base's whole next-token distribution after a fixed context."""
    engine = Engine(folder, page_size=8, kv_cache_tokens=512)
    context, header = token_ids(tiny, 20, seed=1), token_ids(tiny, 3, seed=2)
    return engine.score((context, header), [[token] for token in range(tiny.vocab)], experts=[]).logprobs[0]


def assert_same_weights(folder: Path, other: Path) -> None:
    """Bit for bit, as the engine holds them."""
    config = ModelConfig.load(folder)
    mine, theirs = (load_weights(Checkpoint(at), config, torch.float32, torch.device("cpu")) for at in (folder, other))
    pairs = [(mine.embeddings, theirs.embeddings), (mine.norm, theirs.norm), (mine.head, theirs.head)]
    for layer, same in zip(mine.layers, theirs.layers, strict=True):
        pairs += zip(vars(layer).values(), vars(same).values(), strict=True)
    for tensor, same in pairs:
        assert (tensor is None and same is None) or torch.equal(tensor, same)


def wanted(hf: Any, tiny: Tiny) -> torch.Tensor:
    """The same of transformers."""
    return oracle_logprobs(hf, None, token_ids(tiny, 20, seed=1), token_ids(tiny, 3, seed=2), [5])[0]


def copied(folder: Path, target: Path, **config: Any) -> Path:
    """A copy with changes to its config.json; None takes a key out."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    found = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return target


def resaved(tiny: Tiny, target: Path, change: Callable[[Any], Any] = lambda hf: hf, **save: Any) -> Path:
    """A copy of the model, changed and saved by transformers, with the tokenizer beside it."""
    shutil.copytree(tiny.folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    change(copy.deepcopy(tiny.hf)).save_pretrained(target, **save)
    return target


# --- files -----------------------------------------------------------------------------------------------------------------------


def test_shards_are_one_model(tiny: Tiny, tmp_path: Path) -> None:
    folder = resaved(tiny, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    assert_same_weights(folder, tiny.folder)
    # The same weights elsewhere in memory: matrix libraries choose their loops by alignment too.
    torch.testing.assert_close(scores(tiny, folder), scores(tiny, tiny.folder), atol=TOLERANCE, rtol=0)
    assert fingerprint(folder) == fingerprint(tiny.folder)


def test_head_is_tied_as_the_config_says(tiny: Tiny, tmp_path: Path) -> None:
    """With and without a head of its own in the file, against transformers on the same folder."""
    tensors = load_file(tiny.folder / "model.safetensors")
    assert ("lm_head.weight" in tensors) != tiny.hf.config.tie_word_embeddings
    embeddings = tensors["model.embed_tokens.weight"]
    tied, repeated, untied = (tmp_path / name for name in ("tied", "repeated", "untied"))
    for folder, tie, head in ((tied, True, None), (repeated, True, embeddings), (untied, False, embeddings.flip(0))):
        copied(tiny.folder, folder, tie_word_embeddings=tie)
        own = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
        if head is not None:
            own["lm_head.weight"] = head.contiguous().clone()
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        torch.testing.assert_close(scores(tiny, folder), wanted(hf, tiny), atol=TOLERANCE, rtol=0)
    # The embeddings under the head's name alone, as transformers takes them too.
    alone = copied(tied, tmp_path / "alone")
    own = load_file(tied / "model.safetensors")
    own["lm_head.weight"] = own.pop("model.embed_tokens.weight")
    save_file(own, alone / "model.safetensors", metadata={"format": "pt"})
    hf = AutoModelForCausalLM.from_pretrained(alone, attn_implementation="eager").eval()
    torch.testing.assert_close(scores(tiny, alone), wanted(hf, tiny), atol=TOLERANCE, rtol=0)
    for folder in (repeated, alone):
        assert_same_weights(tied, folder)
        assert fingerprint(tied) == fingerprint(folder)
    assert (scores(tiny, tied) - scores(tiny, untied)).abs().max() > 0.1
    assert fingerprint(tied) != fingerprint(untied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_that_repeats_the_embeddings_in_another_dtype(llama: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    """The values are compared, not how they are stored."""
    folder = copied(llama.folder, tmp_path / "tied", tie_word_embeddings=True)
    own = load_file(folder / "model.safetensors")
    narrow = own["model.embed_tokens.weight"].to(dtype)
    save_file(
        {**own, "model.embed_tokens.weight": narrow, "lm_head.weight": narrow.float()}, folder / "model.safetensors"
    )
    config = ModelConfig.load(folder)
    weights = load_weights(Checkpoint(folder), config, torch.float32, torch.device("cpu"))
    assert weights.head is weights.embeddings and torch.equal(weights.head, narrow.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype_is_read(llama: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    """Computed in float32 on a CPU, from the values as they were rounded."""
    folder = resaved(llama, tmp_path / "narrow", lambda hf: hf.to(dtype))
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {dtype}
    assert ModelConfig.load(folder).dtype == str(dtype).removeprefix("torch.")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    torch.testing.assert_close(scores(llama, folder), wanted(hf, llama), atol=TOLERANCE, rtol=0)
    assert (scores(llama, folder) - scores(llama, llama.folder)).abs().max() > TOLERANCE


# --- fingerprint -----------------------------------------------------------------------------------------------------------------


def with_tiny_weights(hf: Any) -> Any:
    """Some weights so small that float16 makes them 0, of either sign."""
    with torch.no_grad():
        for weight in hf.parameters():
            flat = weight.view(-1)
            flat[::7] = torch.where(torch.arange(len(flat[::7])) % 2 == 0, 1e-9, -1e-9)
    return hf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fingerprint_survives_rounding(tiny: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    narrow = resaved(tiny, tmp_path / "narrow", lambda hf: hf.to(dtype))
    assert fingerprint(narrow) == fingerprint(tiny.folder)
    small = resaved(tiny, tmp_path / "small", with_tiny_weights)
    small_narrow = resaved(tiny, tmp_path / "small-narrow", lambda hf: with_tiny_weights(hf).to(dtype))
    zeros = sum(int((value == 0).sum()) for value in load_file(small_narrow / "model.safetensors").values())
    assert (zeros > 0) == (dtype == torch.float16)
    assert fingerprint(small_narrow) == fingerprint(small) != fingerprint(tiny.folder)


def test_fingerprint_is_the_engine_s_in_any_dtype(llama: Tiny) -> None:
    found = {Engine(llama.folder, dtype=dtype).fingerprint for dtype in ("auto", "float32", "bfloat16", "float16")}
    assert found == {fingerprint(llama.folder)}


def fine_tuned(relative: float) -> Callable[[Any], Any]:
    """Every weight moved by a small part of its tensor's own spread."""

    def change(hf: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in hf.parameters():
                weight += torch.randn(weight.shape, generator=generator) * weight.std() * relative
        return hf

    return change


@pytest.mark.parametrize("relative", [1e-1, 1e-2, 1e-3])
def test_fingerprint_tells_a_fine_tuned_copy(tiny: Tiny, tmp_path: Path, relative: float) -> None:
    assert fingerprint(resaved(tiny, tmp_path / "tuned", fine_tuned(relative))) != fingerprint(tiny.folder)


def test_fingerprint_tells_bases_apart(tiny: Tiny, tmp_path: Path) -> None:
    """Another seed, and the same weights under another shape or rope."""
    family = tiny.hf.config.model_type
    found = [fingerprint(tiny.folder), fingerprint(make_tiny(family, tmp_path / "seed", seed=1).folder)]
    kv_heads = min(2, tiny.hf.config.num_key_value_heads)
    rope = {"rope_type": "linear", "rope_theta": 777.0, "factor": 3.0}
    found.append(fingerprint(copied(tiny.folder, tmp_path / "rope", rope_parameters=rope)))
    found.append(fingerprint(copied(tiny.folder, tmp_path / "theta", rope_parameters={**rope, "rope_theta": 778.0})))
    found.append(
        fingerprint(
            copied(tiny.folder, tmp_path / "heads", num_attention_heads=2, num_key_value_heads=kv_heads, head_dim=32)
        )
    )
    assert len(set(found)) == len(found)
    assert fingerprint(make_tiny(family, tmp_path / "again").folder) == found[0]


# --- config ----------------------------------------------------------------------------------------------------------------------

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default, long": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5},
    "llama3": LLAMA3_ROPE,
    "Llama 3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "Llama 3.2": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_are_transformers(tmp_path: Path, rope: str, head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=131072, rope_parameters=ROPES[rope]
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    want = LlamaRotaryEmbedding(config)
    assert want.attention_scaling == 1.0
    got = ModelConfig.load(tmp_path).inverse_frequencies()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.inv_freq, rtol=1e-6, atol=0)


def test_rope_in_the_old_form(llama: Tiny, tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` at the top, as older checkpoints have them."""
    old = copied(
        llama.folder, tmp_path / "old", rope_parameters=None, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0}
    )  # fmt: skip
    new = copied(llama.folder, tmp_path / "new", rope_parameters={**ROPES["linear"], "factor": 2.0})
    assert ModelConfig.load(old) == ModelConfig.load(new)
    assert fingerprint(old) == fingerprint(new)
    hf = AutoModelForCausalLM.from_pretrained(old, attn_implementation="eager").eval()
    torch.testing.assert_close(scores(llama, old), wanted(hf, llama), atol=TOLERANCE, rtol=0)


def with_attention_biases(folder: Path) -> None:
    """Adds what the config of a Mistral may ask for, and its attention never has."""
    own = load_file(folder / "model.safetensors")
    for name in [name for name in own if name.endswith("_proj.weight") and ".self_attn." in name]:
        own[name.replace(".weight", ".bias")] = torch.full((own[name].shape[0],), 0.5)
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})


SLIDES, WHOLE = "sliding_attention", "full_attention"
WITHOUT_EFFECT: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral's biases": ("mistral", {"attention_bias": True}),
    "mistral's window as long as its contexts": ("mistral", {"sliding_window": 512, "layer_types": [WHOLE, SLIDES, WHOLE]}),
    "qwen2's attention_bias": ("qwen2", {"attention_bias": False}),
    "qwen2's window on no layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": [WHOLE] * 3}),
    "qwen3's window as long as its contexts": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 512, "layer_types": [SLIDES, WHOLE, SLIDES]},
    ),
    "another name of silu": ("llama", {"hidden_act": "swish"}),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_keys_without_effect(tmp_path: Path, case: str) -> None:
    """What transformers reads and computes nothing else for is accepted, and is the same base's function."""
    family, keys = WITHOUT_EFFECT[case]
    base = make_tiny(family, tmp_path / "base")
    folder = copied(base.folder, tmp_path / "copy", **keys)
    if keys.get("attention_bias"):
        with_attention_biases(folder)
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    got = scores(base, folder)
    torch.testing.assert_close(got, wanted(hf, base), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(got, scores(base, base.folder), atol=TOLERANCE, rtol=0)


def end_tokens(folder: Path, config: Any, generation: Any) -> Path:
    """Sets the end tokens of config.json and generation_config.json; a generation of None takes that file away."""
    path, other = folder / "config.json", folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": config}))
    if generation is None:
        other.unlink()
    else:
        other.write_text(json.dumps({**json.loads(other.read_text()), "eos_token_id": generation}))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "accepted"),
    [
        (2, [2, 7], (2, 7)),
        ([2, 9], 7, (7,)),
        ([2, 9], None, (2, 9)),
        (2, None, (2,)),
        (None, None, ()),
        (2, [0, 319], (0, 319)),  # the vocabulary's edges
        (319, None, (319,)),
        (320, 2, (2,)),  # of no use where the other file has them
    ],
)
def test_end_tokens(llama: Tiny, tmp_path: Path, config: Any, generation: Any, accepted: tuple[int, ...]) -> None:
    """generation_config.json's, one or a list; config.json's where there is none."""
    folder = end_tokens(copied(llama.folder, tmp_path / "copy"), config, generation)
    assert ModelConfig.load(folder).eos_ids == accepted


def test_every_end_token_ends_an_answer(llama: Tiny, tmp_path: Path) -> None:
    """Whichever token the model says third ends the answer there, once it is in the list, and is none of its text."""
    ids, sampling = token_ids(llama, 20, seed=3), SamplingParams(max_tokens=6)
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=512)
    free = engine.ask(ids, experts=[], sampling=sampling).experts[0]
    assert free.finish_reason == "length"
    last = free.tokens[2]
    folder = end_tokens(copied(llama.folder, tmp_path / "copy"), 2, [2, last])
    ended = Engine(folder, page_size=8, kv_cache_tokens=512).ask(ids, experts=[], sampling=sampling).experts[0]
    assert ended.tokens == free.tokens[: free.tokens.index(last) + 1]
    assert ended.finish_reason == "stop"
    assert ended.text == llama.tokenizer.decode(ended.tokens[:-1])
