"""A base as a GGUF file for llama.cpp, from the very weights that the engine runs: the same numbers, rounded to the file's type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whispers_engine.config import ModelConfig, read_json
from whispers_engine.errors import WhispersError
from whispers_engine.files import new_file
from whispers_engine.gguf_layout import ROTATED, gguf_names, hf_name, interleaved, part_of
from whispers_engine.pull import home
from whispers_engine.weights import Checkpoint, load_weights

from .llama import named_weights

TYPES = ("f32", "bf16", "q8_0")  # of the matrices; norms are float32 in all, as llama.cpp's own converter has them
_CONTROL, _NORMAL = 3, 1  # GGUF's kinds of tokens

Progress = Callable[[str, int, int], None]  # what is being done, how far, of how much


def as_gguf(folder: Path, kind: str, progress: Progress = lambda what, done, total: None) -> Path:
    """The base of a Hugging Face folder as a GGUF file of one of `TYPES`, kept in `$WHISPERS_HOME/gguf` and made when it is not there.

    Raises:
        WhispersError: a base that this writer does not know how to say in GGUF.
    """
    config = ModelConfig.load(folder)
    _check(config, folder)
    checkpoint = Checkpoint(folder)
    path = home() / "gguf" / f"{folder.name}-{checkpoint.fingerprint(config)}-{kind}.gguf"
    if not path.is_file():
        with new_file(path) as new:
            _write(new, folder, checkpoint, config, kind, progress)
    return path


def _check(config: ModelConfig, folder: Path) -> None:
    """Raises WhispersError for what GGUF's `llama` would need more metadata or tensors for than are written here."""
    for what, found, accepted in (
        ("model_type", config.family, ("llama", "mistral")),
        ("rope_type", config.rope_type, ("default",)),
        ("biases", config.qkv_bias or config.out_bias or config.mlp_bias, (False,)),
    ):
        if found not in accepted:
            raise WhispersError(f"{folder.name} as GGUF: {what} {found!r}; accepted: {', '.join(map(str, accepted))}")


def _write(
    path: Path, folder: Path, checkpoint: Checkpoint, config: ModelConfig, kind: str, progress: Progress
) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quantize

    file_type, matrix = {
        "f32": (LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
        "bf16": (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
        "q8_0": (LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
    }[kind]
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(file_type)
    _add_config(writer, config)
    _add_tokenizer(writer, folder, config)
    named = named_weights(config, load_weights(checkpoint, config, torch.float32, torch.device("cpu")))
    heads = dict(zip(ROTATED, (config.q_heads, config.kv_heads), strict=True))
    names = list(gguf_names(config.num_layers, config.tied_head))
    for index, name in enumerate(names):
        value = named[hf_name(name)].numpy()
        part = part_of(name)
        if part in heads:
            value = interleaved(value, heads[part])
        stored = GGMLQuantizationType.F32 if value.ndim == 1 else matrix
        writer.add_tensor(name, quantize(np.ascontiguousarray(value), stored), raw_dtype=stored)
        progress(f"writing {path.name}", index + 1, len(names))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.q_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _add_tokenizer(writer: Any, folder: Path, config: ModelConfig) -> None:
    """Name, licence, byte-level BPE and chat template, as `pull` reads them; of another kind of tokenizer, nothing but its absence.

    Benchmarks speak in token ids, so that a base without its tokenizer is measured just as well.
    """
    source, settings = (_json_or_empty(folder / name) for name in ("source.json", "tokenizer_config.json"))
    writer.add_name(source.get("name", folder.name))
    if "license" in source:
        writer.add_license(source["license"])
    tokenizer = _json_or_empty(folder / "tokenizer.json")
    model = tokenizer.get("model", {})
    vocab: dict[str, int] = model.get("vocab", {})
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", ())}
    tokens = {index: token for token, index in (vocab | added).items()}
    if model.get("type") != "BPE" or sorted(tokens) != list(range(config.vocab_size)):
        writer.add_tokenizer_model("none")
        return
    special = {entry["id"] for entry in tokenizer["added_tokens"] if entry["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if "individual_digits" in json.dumps(tokenizer["pre_tokenizer"]) else "gpt-2")
    writer.add_token_list([tokens[index] for index in range(config.vocab_size)])
    writer.add_token_types([_CONTROL if index in special else _NORMAL for index in range(config.vocab_size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    ids = vocab | added
    for key, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        if settings.get(key) in ids:
            add(ids[settings[key]])
    writer.add_add_bos_token(False)
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
