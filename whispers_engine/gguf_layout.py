"""How GGUF calls and lays out a Llama's tensors, and transformers the same: `pull` reads GGUF, benchmarks write it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_PARTS = {
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
_FIXED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROTATED = ("attn_q", "attn_k")  # parts whose rows GGUF interleaves


def gguf_names(layers: int, tied: bool) -> Iterator[str]:
    """All the tensors of a Llama without biases."""
    yield from (name for name in _FIXED if not (tied and name == "output.weight"))
    for index in range(layers):
        yield from (f"blk.{index}.{part}.weight" for part in _PARTS)


def part_of(name: str) -> str:
    """`attn_q` of `blk.7.attn_q.weight`."""
    return name.split(".")[-2]


def hf_name(name: str) -> str:
    """What transformers calls the tensor that GGUF calls so."""
    if name in _FIXED:
        return _FIXED[name]
    _, layer, part, kind = name.split(".")  # blk.7.attn_q.weight
    return f"model.layers.{layer}.{_PARTS[part]}.{kind}"


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's interleaving of rotary pairs, row `2i + j` of a head being row `j D/2 + i` in transformers' layout."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `half_split`."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
