"""A base model's weights, straight from memory-mapped safetensors, and the fingerprint that ties experts to them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import DTYPES, ModelConfig, read_json
from .errors import WhispersError

_SIGNS_PER_TENSOR = 4096
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Projections that read the same input are one matrix."""

    attn_norm: Tensor  # [hidden]
    qkv: Tensor  # [(Hq + 2 Hkv) D, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None
    out: Tensor  # [hidden, Hq D]
    out_bias: Tensor | None
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 I, hidden]
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, I]
    down_bias: Tensor | None


@dataclass(frozen=True)
class Weights:
    """All weights of a base, in one dtype on one device."""

    embeddings: Tensor  # [V, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [V, hidden]; the embeddings themselves where they are tied

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        ends = [self.embeddings, self.norm] if self.head is self.embeddings else [self.embeddings, self.norm, self.head]
        inner = [value for layer in self.layers for value in vars(layer).values() if value is not None]
        return sum(value.nbytes for value in (*ends, *inner))


class Checkpoint:
    """The tensors of a folder's safetensors files, by name, memory-mapped.

    Raises:
        WhispersError: no safetensors (pickles are never read), a shard that is missing or damaged, a tensor that is missing or misshapen.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.is_file():
            files = [single]
        elif index.is_file():
            # Names from a file of the folder: a name that leads out of it is refused, whatever it points to.
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise WhispersError(f"{index}: weight_map {weight_map!r}; accepted: an object from tensors to shards")
            names = sorted({str(name) for name in weight_map.values()})
            files = [folder / name for name in names]
            for file in files:
                if file.parent != folder or not file.is_file():
                    raise WhispersError(f"{index}: names the shard {file.name!r}, which is not in {folder}")
        else:
            pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
            found = f"pickles ({', '.join(pickles)}), which are never read" if pickles else "no weights"
            raise WhispersError(f"{folder}: holds {found}; accepted: model.safetensors, or its index and shards")
        self._where: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WhispersError(f"{file}: not a safetensors file: {error}") from error
            self._where.update(dict.fromkeys(handle.keys(), handle))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def tensor(self, name: str, *shape: int) -> Tensor:
        if name not in self._where:
            raise WhispersError(
                f"{self.folder}: the tensor {name!r} is missing; its config.json asks for it, {list(shape)}"
            )
        value = self._where[name].get_tensor(name)
        if tuple(value.shape) != shape:
            raise WhispersError(
                f"{self.folder}: the tensor {name!r} is {list(value.shape)}; its config.json asks for {list(shape)}"
            )
        if value.dtype not in DTYPES.values():
            raise WhispersError(
                f"{self.folder}: the tensor {name!r} holds {value.dtype}; accepted: {', '.join(DTYPES)}"
            )
        return value

    def embeddings_name(self, config: ModelConfig) -> str:
        """What the file calls the token embeddings. Tied, they may stand there as the head alone, or a second time as the head.

        Raises:
            WhispersError: a head of its own where the config ties it: transformers, too, would then not do as the config says.
        """
        if not config.tied_head or _HEAD not in self:
            return _EMBEDDINGS
        if _EMBEDDINGS not in self:
            return _HEAD
        table, head = (self.tensor(name, config.vocab_size, config.hidden_size) for name in (_EMBEDDINGS, _HEAD))
        if not torch.equal(table, head):  # of values: one may be stored wider than the other
            raise WhispersError(
                f"{self.folder}: config.json says tie_word_embeddings true, but {_HEAD!r} differs from {_EMBEDDINGS!r}; accepted: "
                f"tie_word_embeddings false, for a head of its own, or a file without {_HEAD!r}"
            )
        return _EMBEDDINGS

    def fingerprint(self, config: ModelConfig) -> str:
        """Names the base: the shape of the model and the signs of each tensor's first weights.

        Signs, since rounding to another dtype never changes one (not even when a value becomes zero), while another training does.

        Raises:
            WhispersError: as `embeddings_name`.
        """
        embeddings = self.embeddings_name(config)
        digest = hashlib.sha256()
        shape = (
            config.vocab_size,
            config.hidden_size,
            config.num_layers,
            config.q_heads,
            config.kv_heads,
            config.head_dim,
        )
        digest.update(repr((config.family, shape, config.rope_type, config.rope)).encode())
        # Tied, it is the same base whether the file has the embeddings, the head, or both.
        own = {_EMBEDDINGS if name == embeddings else name: name for name in self._where}
        for name in sorted(own):
            if name == _HEAD and config.tied_head:
                continue
            value = self._where[own[name]].get_tensor(own[name])
            if value.dtype not in DTYPES.values():
                continue  # a buffer, or what `tensor` will refuse
            signs = torch.signbit(value.flatten()[:_SIGNS_PER_TENSOR])
            digest.update(f"{name} {list(value.shape)}".encode())
            digest.update(np.packbits(signs.numpy()).tobytes())
        return digest.hexdigest()[:32]


def load_weights(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Reads every weight that the decoder needs. Raises WhispersError as `Checkpoint` does, before anything is computed."""

    hidden, mlp, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_width, kv_width = config.q_heads * dim, config.kv_heads * dim

    def get(name: str, *shape: int) -> Tensor:
        return checkpoint.tensor(name, *shape).to(device=device, dtype=dtype)

    def stack(layer: str, parts: dict[str, int], *width: int) -> Tensor:
        return torch.cat([get(f"{layer}.{part}", rows, *width) for part, rows in parts.items()])

    layers = []
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        attn = f"{layer}.self_attn"
        heads = {"q": q_width, "k": kv_width, "v": kv_width}
        gates = {"gate": mlp, "up": mlp}
        layers.append(
            LayerWeights(
                attn_norm=get(f"{layer}.input_layernorm.weight", hidden),
                qkv=stack(attn, {f"{name}_proj.weight": rows for name, rows in heads.items()}, hidden),
                qkv_bias=stack(attn, {f"{name}_proj.bias": rows for name, rows in heads.items()})
                if config.qkv_bias
                else None,
                q_norm=get(f"{attn}.q_norm.weight", dim) if config.qk_norm else None,
                k_norm=get(f"{attn}.k_norm.weight", dim) if config.qk_norm else None,
                out=get(f"{attn}.o_proj.weight", hidden, q_width),
                out_bias=get(f"{attn}.o_proj.bias", hidden) if config.out_bias else None,
                mlp_norm=get(f"{layer}.post_attention_layernorm.weight", hidden),
                gate_up=stack(f"{layer}.mlp", {f"{name}_proj.weight": rows for name, rows in gates.items()}, hidden),
                gate_up_bias=stack(f"{layer}.mlp", {f"{name}_proj.bias": rows for name, rows in gates.items()})
                if config.mlp_bias
                else None,
                down=get(f"{layer}.mlp.down_proj.weight", hidden, mlp),
                down_bias=get(f"{layer}.mlp.down_proj.bias", hidden) if config.mlp_bias else None,
            )
        )
    embeddings = get(checkpoint.embeddings_name(config), config.vocab_size, hidden)
    return Weights(
        embeddings=embeddings,
        layers=tuple(layers),
        norm=get("model.norm.weight", hidden),
        head=embeddings if config.tied_head else get(_HEAD, config.vocab_size, hidden),
    )
