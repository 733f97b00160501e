"""What the engine needs to know of a base model, read from its `config.json`, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import WhispersError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# What each accepted rope type reads from the config.
ROPE_TYPES = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama, Mistral, Qwen2 or Qwen3 family."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_position: int  # positions the model was made for
    norm_eps: float
    tied_head: bool
    qkv_bias: bool
    out_bias: bool  # of attention's output projection
    mlp_bias: bool
    qk_norm: bool
    rope_type: str  # one of ROPE_TYPES
    rope: dict[str, float]  # what that type reads
    eos_ids: tuple[int, ...]
    dtype: str  # as stored; one of DTYPES

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Reads `config.json` and `generation_config.json`.

        Raises:
            WhispersError: another architecture, an active sliding window, an unknown rope type, a quantised checkpoint, or another
                feature that the decoder does not compute; names it and what is supported.
        """
        from transformers import AutoConfig

        path = folder / "config.json"
        if not path.is_file():
            raise WhispersError(
                f"{folder}: no config.json; accepted: a Hugging Face folder with config.json and safetensors"
            )
        raw = read_json(path)
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise WhispersError(f"{path}: model_type {family!r} is not supported; accepted: {', '.join(FAMILIES)}")

        def refuse_unless(condition: bool, name: str, found: Any, accepted: str) -> None:
            if not condition:
                raise WhispersError(f"{path}: {name} {found!r} is not supported; accepted: {accepted}")

        # Before transformers reads it: of such a config, most of what is asked for below is an error of its own type.
        layers_apart = raw.get("per_layer_config")
        refuse_unless(not layers_apart, "per_layer_config", layers_apart, "none, all layers alike")
        try:
            hf = AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers' validation raises several types of its own
            raise WhispersError(f"{path}: transformers cannot read it: {error}") from error

        causal = getattr(hf, "is_causal", True)
        refuse_unless(bool(causal), "is_causal", causal, "true")
        _refuse_window(path, family, hf)
        refuse_unless(hf.hidden_act in ("silu", "swish"), "hidden_act", hf.hidden_act, "silu")  # two names of one
        quantized = getattr(hf, "quantization_config", None)
        refuse_unless(quantized is None, "quantization_config", quantized, "float32, bfloat16 or float16 weights")
        rope = dict(hf.rope_parameters)
        rope_type = rope.get("rope_type", "default")
        refuse_unless(rope_type in ROPE_TYPES, "rope_type", rope_type, ", ".join(ROPE_TYPES))
        missing = [key for key in ROPE_TYPES[rope_type] if not isinstance(rope.get(key), int | float)]
        refuse_unless(not missing, "rope_parameters without", missing, f"{rope_type} with {ROPE_TYPES[rope_type]}")
        partial = rope.get("partial_rotary_factor", 1.0)
        refuse_unless(partial in (None, 1.0), "partial_rotary_factor", partial, "1.0")
        dtype = str(hf.dtype or "float32").removeprefix("torch.")
        refuse_unless(dtype in DTYPES, "dtype", dtype, ", ".join(DTYPES))

        kv_heads = hf.num_key_value_heads
        divides = kv_heads >= 1 and hf.num_attention_heads % kv_heads == 0
        refuse_unless(
            divides, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {hf.num_attention_heads}"
        )

        # The other two families' attention does not read the key: Qwen2's has its biases whatever it says, Mistral's has none.
        attention_bias = family in ("llama", "qwen3") and bool(hf.attention_bias)
        generation = folder / "generation_config.json"
        eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
        eos_file, eos = (path, hf.eos_token_id) if eos is None else (generation, eos)
        return cls(
            family=family,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            q_heads=hf.num_attention_heads,
            kv_heads=kv_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            max_position=hf.max_position_embeddings,
            norm_eps=hf.rms_norm_eps,
            tied_head=hf.tie_word_embeddings,
            qkv_bias=family == "qwen2" or attention_bias,
            out_bias=attention_bias,
            mlp_bias=family == "llama" and bool(getattr(hf, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            rope_type=rope_type,
            rope={key: float(rope[key]) for key in ROPE_TYPES[rope_type]},
            eos_ids=_eos_ids(eos_file, eos, hf.vocab_size),
            dtype=dtype,
        )

    def inverse_frequencies(self) -> torch.Tensor:
        """Rotary angle per position, float32 `[head_dim / 2]` (arXiv 2104.09864; llama3: Llama 3.1's piecewise stretch)."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        inverse = 1.0 / self.rope["rope_theta"] ** exponent
        if self.rope_type == "linear":
            return inverse / self.rope["factor"]
        if self.rope_type == "llama3":
            factor, low, high = (self.rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
            turns = self.rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
            # Below `low` turns over the original length: stretched; above `high`: kept; a straight line between.
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            return inverse * (keep + (1 - keep) / factor)
        return inverse


def _refuse_window(path: Path, family: str, hf: Any) -> None:
    """Raises WhispersError where some layer does not see all positions that the model was made for."""
    kinds = sorted(set(getattr(hf, "layer_types", None) or ()))
    known = ("full_attention",) if family == "llama" else ("full_attention", "sliding_attention")
    if not set(kinds) <= set(known):
        raise WhispersError(f"{path}: layer_types {kinds} are not supported; accepted: {', '.join(known)}")
    # Llama has no window; Mistral's is every layer's; Qwen's is that of the layers that are said to slide.
    slides = family == "mistral" or "sliding_attention" in kinds
    window = hf.sliding_window if slides else None
    if window is not None and window < hf.max_position_embeddings:
        raise WhispersError(
            f"{path}: sliding_window {window!r} is not supported; accepted: no active window, that is null or at least "
            f"max_position_embeddings {hf.max_position_embeddings}"
        )


def _eos_ids(path: Path, found: Any, vocab_size: int) -> tuple[int, ...]:
    """Checks `eos_token_id`, which ends answers; transformers validates it in config.json only, and its range nowhere."""
    ids = () if found is None else tuple(found) if isinstance(found, list) else (found,)
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise WhispersError(
                f"{path}: eos_token_id {found!r} is not supported; accepted: null, an integer in [0, {vocab_size}) or a list of them"
            )
    return ids


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:  # its own text has the path a second time
        raise WhispersError(
            f"{path}: cannot be read: {error.strerror}; accepted: a file that holds a JSON object"
        ) from error
    except ValueError as error:
        raise WhispersError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise WhispersError(f"{path}: holds a JSON {type(value).__name__}; accepted: an object")
    return value
