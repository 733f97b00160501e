"""Each placement's definition in plain transformers, and PEFT's own models. Nothing of the engine is used but an expert's tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whispers_engine import Expert


@torch.no_grad()
def oracle_logprobs(hf: Any, expert: Expert | None, context: list[int], header: list[int], option: list[int]) -> Tensor:
    """Log-probabilities after the header and after every token of the option but the last: `[len(option), V]`."""
    tail = [*header, *option[:-1]]
    if expert is None:
        logits = hf(torch.tensor([context + tail])).logits
    elif expert.placement == "suffix":
        embed = hf.get_input_embeddings()
        parts = (embed(torch.tensor(context)), expert.embeddings.to(hf.dtype), embed(torch.tensor(tail)))
        logits = hf(inputs_embeds=torch.cat(parts)[None]).logits
    elif expert.placement == "prefix":
        logits = _peft(hf, expert)(torch.tensor([context + tail])).logits
    elif expert.kind == "embeddings":
        logits = _detached(hf, expert, context, tail)
    else:
        logits = _detached_kv(hf, expert, context, tail)
    return logits[0, -len(option) :].float().log_softmax(-1)


def _peft(hf: Any, expert: Expert) -> Any:
    """PEFT's own prompt-tuned or prefix-tuned model with the expert's values in it."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
    from peft.peft_model import PeftModel

    if expert.kind == "embeddings":
        model = get_peft_model(hf, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=expert.num_tokens))
        values = expert.embeddings
    else:
        layers, _, heads, m, dim = expert.embeddings.shape
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=m,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * dim,
        )
        model = get_peft_model(hf, config)
        values = expert.embeddings.permute(3, 0, 1, 2, 4).reshape(m, -1)
    assert isinstance(model, PeftModel)
    weight = model.prompt_encoder["default"].embedding.weight
    assert weight.shape == values.shape
    weight.data.copy_(values)
    return model.eval()


def _mask(m: int, context: int, tail: int, rows_of_prompt: bool) -> Tensor:
    """4D mask, additive: causal, and the context does not see the m positions in front of it."""
    length = m + context + tail
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    visible[m : m + context, :m] = False
    if not rows_of_prompt:
        visible = visible[m:]
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float16).min)[None, None]


def _detached(hf: Any, expert: Expert, context: list[int], tail: list[int]) -> Tensor:
    embed = hf.get_input_embeddings()
    embeds = torch.cat((expert.embeddings.to(hf.dtype), embed(torch.tensor(context + tail))))[None]
    mask = _mask(expert.num_tokens, len(context), len(tail), rows_of_prompt=True).to(hf.dtype)
    return hf(inputs_embeds=embeds, attention_mask=mask, position_ids=torch.arange(embeds.shape[1])[None]).logits


def _detached_kv(hf: Any, expert: Expert, context: list[int], tail: list[int]) -> Tensor:
    from transformers import DynamicCache

    cache, m = DynamicCache(config=hf.config), expert.num_tokens
    for layer, (keys, values) in enumerate(expert.embeddings.to(hf.dtype)):
        cache.update(keys[None], values[None], layer)
    rows = len(context) + len(tail)
    return hf(
        torch.tensor([context + tail]),
        attention_mask=_mask(m, len(context), len(tail), rows_of_prompt=False).to(hf.dtype),
        position_ids=torch.arange(m, m + rows)[None],
        past_key_values=cache,
    ).logits
