"""What a user would otherwise run for decode attention, each on the same keys in the layout that it likes best.

A peer is a function from inputs to calls, one for each copy of its inputs; a call returns the result in any shape of `[E, Hq, D]`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import OWN_KEYS, PAGE_SIZE, DecodeInputs, DecodeShape
from .measure import Call, copies

_WORKSPACE = 128 << 20  # bytes that FlashInfer asks for


class Unavailable(Exception):
    """The peer cannot run here; says why."""


class Peer(NamedTuple):
    """How a peer is set up, and the bytes that one copy of its inputs takes."""

    build: Callable[[DecodeInputs], list[Call]]
    bytes: Callable[[DecodeShape], int]


def _repeated(inputs: DecodeInputs, heads_first: bool) -> tuple[Tensor, Tensor]:
    """Keys and values with the context repeated for each expert: `[copies, E, S + own, Hkv, D]`, or `[copies, E, Hkv, S + own, D]`."""
    shape = inputs.shape
    number = copies(shape.repeated_bytes, inputs.device)
    size = (shape.keys, shape.heads.kv) if not heads_first else (shape.heads.kv, shape.keys)
    both = []
    for pages in (inputs.k_pages, inputs.v_pages):
        store = torch.empty(number, shape.experts, *size, shape.heads.dim, dtype=shape.dtype, device=inputs.device)
        for row in range(shape.experts):
            keys = inputs.gather(pages, row)
            store[:, row] = keys.transpose(0, 1) if heads_first else keys
        both.append(store)
    return both[0], both[1]


def sdpa_repeated(inputs: DecodeInputs) -> list[Call]:
    """PyTorch's own attention, a batch of E sequences, each with a cache of its own."""
    k, v = _repeated(inputs, heads_first=True)
    q = inputs.q[0][:, :, None]  # [E, Hq, 1, D]
    return [partial(F.scaled_dot_product_attention, q, k[i], v[i], enable_gqa=True) for i in range(k.shape[0])]


def flex(inputs: DecodeInputs) -> list[Call]:
    """FlexAttention, compiled for this very shape: all keys once, and a block mask that keeps the branches apart."""
    if inputs.device.type != "cuda":
        raise Unavailable("cuda only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = inputs.shape
    context = shape.context

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key < context) | ((key - context) // OWN_KEYS == row)

    total = context + shape.experts * OWN_KEYS
    number = inputs.copies

    def laid_out(pages: Tensor) -> Tensor:
        own = [pages[0, page, :OWN_KEYS] for page in inputs.own_pages]
        keys = torch.cat((inputs.gather(pages, 0)[:context], *own))  # [S + E own, Hkv, D]
        return keys.transpose(0, 1)[None, None].expand(number, 1, -1, -1, -1).contiguous()

    k, v = laid_out(inputs.k_pages), laid_out(inputs.v_pages)
    q = inputs.q[0].transpose(0, 1)[None].contiguous()  # [1, Hq, E, D]
    mask = create_block_mask(visible, None, None, shape.experts, total, device=inputs.device)
    torch.compiler.reset()  # past a number of shapes the compiler would give up and run it unfused
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)

    def call(i: int) -> Tensor:
        out: Tensor = compiled(q, k[i], v[i], block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)  # [E, Hq, D]

    return [partial(call, i) for i in range(number)]


def flashinfer_cascade(inputs: DecodeInputs) -> list[Call]:
    """FlashInfer's cascade, which reads the same pages as we do: one level for the context, one for the branches' own keys."""
    if inputs.device.type != "cuda":
        raise Unavailable("cuda only")
    flashinfer = _module("flashinfer")
    shape, experts = inputs.shape, inputs.shape.experts

    def ints(values: list[int] | range) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=inputs.device)

    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=inputs.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    wrapper.plan(
        [ints([0, experts]), ints(range(experts + 1))],
        [ints([0, len(inputs.context_pages)]), ints(range(experts + 1))],
        [ints(inputs.context_pages), ints(inputs.own_pages)],
        [ints([(shape.context - 1) % PAGE_SIZE + 1]), ints([OWN_KEYS] * experts)],
        shape.heads.q,
        shape.heads.kv,
        shape.heads.dim,
        PAGE_SIZE,
        q_data_type=shape.dtype,
    )
    return [partial(wrapper.run, inputs.q[i], (inputs.k_pages[i], inputs.v_pages[i])) for i in range(inputs.copies)]


def flash_attn(inputs: DecodeInputs) -> list[Call]:
    """FlashAttention's decode over caches that repeat the context; version 3 where that is installed."""
    if inputs.device.type != "cuda":
        raise Unavailable("cuda only")
    newest = "flash_attn_interface"
    module = _module(newest if importlib.util.find_spec(newest) else "flash_attn")
    k, v = _repeated(inputs, heads_first=False)
    q = inputs.q[0][:, None]  # [E, 1, Hq, D]
    lengths = torch.full((inputs.shape.experts,), inputs.shape.keys, dtype=torch.int32, device=inputs.device)
    return [partial(module.flash_attn_with_kvcache, q, k[i], v[i], cache_seqlens=lengths) for i in range(k.shape[0])]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # not installed, or built for another torch: several types
        raise Unavailable(f"{name} cannot be imported: {error}") from error


PEERS = {
    "sdpa-repeated": Peer(sdpa_repeated, lambda shape: shape.repeated_bytes),
    "flashinfer-cascade": Peer(flashinfer_cascade, lambda shape: _WORKSPACE),
    "flash-attn": Peer(flash_attn, lambda shape: shape.repeated_bytes),
    "flex": Peer(flex, lambda shape: shape.bytes),
}
