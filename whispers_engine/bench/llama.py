"""Llamas of known shapes with random weights, for the engine and for transformers alike: both read the same memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from whispers_engine.config import ModelConfig
from whispers_engine.weights import LayerWeights, Weights


@dataclass(frozen=True)
class LlamaShape:
    """A Llama's sizes."""

    hidden: int
    mlp: int
    layers: int
    q_heads: int
    kv_heads: int
    dim: int
    vocab: int
    tied: bool

    def shallow(self, layers: int = 2) -> LlamaShape:
        """The same with fewer layers, for checks."""
        return replace(self, layers=min(layers, self.layers))

    def config(self) -> ModelConfig:
        return ModelConfig(
            family="llama",
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_layers=self.layers,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            max_position=1 << 17,
            norm_eps=1e-5,
            tied_head=self.tied,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            qk_norm=False,
            rope_type="default",
            rope={"rope_theta": 500000.0},
            eos_ids=(),  # every branch runs to its last token
            dtype="bfloat16",
        )


SHAPES = {
    "llama-1b": LlamaShape(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "llama-8b": LlamaShape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "tiny": LlamaShape(64, 160, 2, 4, 2, 16, 320, tied=False),
}


def random_weights(shape: LlamaShape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weights:
    """Weights that keep the size of what passes through them, so that every one matters."""
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, width: int, scale: float = 1.0) -> Tensor:
        out = torch.empty(rows, width, dtype=dtype, device=device)
        return out.normal_(0.0, scale * width**-0.5, generator=generator)

    def norm() -> Tensor:
        out = torch.empty(shape.hidden, dtype=dtype, device=device)
        return out.normal_(1.0, 0.1, generator=generator)

    q_width, kv_width = shape.q_heads * shape.dim, shape.kv_heads * shape.dim
    layers = tuple(
        LayerWeights(
            attn_norm=norm(),
            qkv=matrix(q_width + 2 * kv_width, shape.hidden),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            out=matrix(shape.hidden, q_width),
            out_bias=None,
            mlp_norm=norm(),
            gate_up=matrix(2 * shape.mlp, shape.hidden),
            gate_up_bias=None,
            down=matrix(shape.hidden, shape.mlp),
            down_bias=None,
        )
        for _ in range(shape.layers)
    )
    # Logits with a spread of 4: neither is every token about as likely, nor one certain.
    head = matrix(shape.vocab, shape.hidden, scale=4.0)
    embeddings = head if shape.tied else matrix(shape.vocab, shape.hidden, scale=shape.hidden**0.5)
    return Weights(embeddings=embeddings, layers=layers, norm=norm(), head=head)


def as_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same numbers in another dtype; what is there in it already is not copied."""

    layers = tuple(
        replace(layer, **{name: value.to(dtype) for name, value in vars(layer).items() if value is not None})
        for layer in weights.layers
    )
    embeddings = weights.embeddings.to(dtype)
    head = embeddings if weights.head is weights.embeddings else weights.head.to(dtype)
    return Weights(embeddings=embeddings, layers=layers, norm=weights.norm.to(dtype), head=head)


def weight_bytes(weights: Weights) -> int:
    """What a step of few rows must read: everything but the embeddings, of which it reads its rows (the head, where they are tied)."""
    total = weights.norm.nbytes + weights.head.nbytes
    for layer in weights.layers:
        total += sum(value.nbytes for value in vars(layer).values() if value is not None)
    return total


def transformers_model(shape: LlamaShape, weights: Weights) -> Any:
    """transformers' Llama over views of the same weights: nothing is copied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.dim,
        max_position_embeddings=1 << 17,
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(named_weights(shape.config(), weights), strict=True, assign=True)
    # Not among the weights, and still without memory.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(weights.norm.device)
    return model.eval().requires_grad_(False)


def named_weights(config: ModelConfig, weights: Weights) -> dict[str, Tensor]:
    """transformers' names for the weights of a model without biases, the stacked ones taken apart."""
    named = {"model.embed_tokens.weight": weights.embeddings, "model.norm.weight": weights.norm}
    named["lm_head.weight"] = weights.head
    q_width, kv_width = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    for index, layer in enumerate(weights.layers):
        at = f"model.layers.{index}"
        named[f"{at}.input_layernorm.weight"] = layer.attn_norm
        named[f"{at}.post_attention_layernorm.weight"] = layer.mlp_norm
        for name, part in zip("qkv", layer.qkv.split([q_width, kv_width, kv_width]), strict=True):
            named[f"{at}.self_attn.{name}_proj.weight"] = part
        named[f"{at}.self_attn.o_proj.weight"] = layer.out
        for name, part in zip(("gate", "up"), layer.gate_up.chunk(2), strict=True):
            named[f"{at}.mlp.{name}_proj.weight"] = part
        named[f"{at}.mlp.down_proj.weight"] = layer.down
    return named
