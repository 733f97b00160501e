"""The loss of one branch by transformers and PEFT on its full sequence, with autograd from end to end; nothing of the trainer is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def oracle_loss(
    hf: Any,
    kind: str,
    placement: str,
    value: Tensor,
    context: Sequence[int],
    header: Sequence[int],
    options: Sequence[Sequence[int]],
    shares: Sequence[float] | None,
) -> Tensor:
    """Cross-entropy of `shares` against the options' probabilities; of `None`, the mean negative log-probability of the only option.

    Args:
        value: the soft prompt `[m, hidden]` or the learned keys and values `[layers, 2, Hkv, m, D]`, a leaf that wants a gradient.
    """
    scores, tokens = [], []
    for option in options:
        logprobs = _logprobs(hf, kind, placement, value, list(context), [*header, *option[:-1]])[-len(option) :]
        tokens.append(logprobs[torch.arange(len(option)), torch.tensor(option)])
        scores.append(tokens[-1].sum())
    if shares is None:
        return -tokens[0].mean()
    return -(torch.tensor(shares) * torch.stack(scores).log_softmax(0)).sum()


def _logprobs(hf: Any, kind: str, placement: str, value: Tensor, context: list[int], tail: list[int]) -> Tensor:
    """Next-token log-probabilities of every position from the context's first on."""
    embed = hf.get_input_embeddings()
    text = embed(torch.tensor(context + tail))
    at = len(context)
    if kind == "embeddings" and placement == "suffix":
        logits = hf(inputs_embeds=torch.cat((text[:at], value, text[at:]))[None]).logits
    elif placement == "prefix":
        logits = _peft(hf, kind, value, context + tail)
    elif kind == "embeddings":
        embeds = torch.cat((value, text))[None]
        mask = _mask(len(value), at, len(tail))
        logits = hf(inputs_embeds=embeds, attention_mask=mask, position_ids=torch.arange(embeds.shape[1])[None]).logits
    else:
        m = value.shape[3]
        logits = hf(
            torch.tensor([context + tail]),
            attention_mask=_mask(m, at, len(tail))[:, :, m:],
            position_ids=torch.arange(m, m + len(text))[None],
            past_key_values=_cache(hf, value),
        ).logits
    return logits[0].float().log_softmax(-1)


def _mask(m: int, context: int, tail: int) -> Tensor:
    visible = torch.ones(m + context + tail, m + context + tail, dtype=torch.bool).tril()
    visible[m : m + context, :m] = False
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


def _cache(hf: Any, value: Tensor) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=hf.config)
    for layer, (keys, values) in enumerate(value):
        cache.update(keys[None], values[None], layer)
    return cache


def _peft(hf: Any, kind: str, value: Tensor, ids: list[int]) -> Tensor:
    """PEFT's own model, its parameter replaced by a view of `value` so that the gradient arrives there."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    if kind == "embeddings":
        m = value.shape[0]
        config: Any = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=m)
        flat = value
    else:
        layers, _, heads, m, dim = value.shape
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=m,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * dim,
        )
        flat = value.permute(3, 0, 1, 2, 4).reshape(m, -1)
    model = get_peft_model(hf, config)
    embedding = model.prompt_encoder["default"].embedding
    assert embedding.weight.shape == flat.shape
    del embedding.weight
    embedding.weight = flat
    return model(torch.tensor([ids])).logits
