"""Before a training step is timed: its gradient beside autograd's through transformers on the full sequence, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whispers_engine.engine import base_folder
from whispers_engine.training.base import Base
from whispers_engine.training.examples import Example
from whispers_engine.training.sampler import Drawn
from whispers_engine.training.step import Stepper

_COSINE = 0.98  # of directions in bfloat16, seen: 0.995 and more


def check_gradient(
    base: Base, stepper: Stepper, soft: Tensor, examples: Sequence[Example], placement: str
) -> dict[str, Any]:
    """Compares loss and gradient of one soft prompt `[1, m, hidden]` over a few free answers.

    Returns:
        ok, the cosine of the two gradients, both losses.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder(base.name), dtype=torch.float32)
    model.requires_grad_(False)
    drawn = [Drawn(0, example.prompts[0], example.shares[0]) for example in examples]
    losses, ours = stepper.gradient(soft.to(base.device), drawn)
    leaf = soft[0].detach().cpu().float().requires_grad_()
    loss = torch.stack([_loss(model, leaf, example, placement) for example in examples]).mean()
    (theirs,) = torch.autograd.grad(loss, leaf)
    cosine = float(torch.cosine_similarity(ours[0].cpu().flatten(), theirs.flatten(), dim=0))
    mine, wanted = float(losses.mean()), float(loss.detach())
    ok = cosine >= _COSINE and abs(mine - wanted) <= 0.05 * max(1.0, wanted)
    return {"ok": ok, "cosine": cosine, "loss": mine, "transformers_loss": wanted}


def _loss(model: Any, soft: Tensor, example: Example, placement: str) -> Tensor:
    prompt = example.prompts[0]
    answer = torch.tensor(prompt.options[0])
    embed = model.get_input_embeddings()
    context, tail = embed(torch.tensor(prompt.context)), embed(torch.tensor([*prompt.header, *answer[:-1].tolist()]))
    if placement == "suffix":
        logits = model(inputs_embeds=torch.cat((context, soft, tail))[None]).logits
    else:
        m, length = len(soft), len(soft) + len(context) + len(tail)
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        visible[m : m + len(context), :m] = False
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
        logits = model(
            inputs_embeds=torch.cat((soft, context, tail))[None],
            attention_mask=mask,
            position_ids=torch.arange(length)[None],
        ).logits
    return torch.nn.functional.cross_entropy(logits[0, -len(answer) :], answer)
