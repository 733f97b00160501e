"""Before a training step is timed: its gradients beside autograd's through transformers on full sequences, in float32."""

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

_SUMMATION = 1e-2  # of a gradient's size: what two orders of summation make of it in float32, and much more


def check_gradient(
    base: Base, stepper: Stepper, soft: Tensor, examples: Sequence[Sequence[Example]], placement: str
) -> dict[str, Any]:
    """Compares losses and gradients of soft prompts `[E, m, hidden]` over a few free answers of each.

    An error is how far all experts' gradients, or losses, are from autograd's in float32, over the size of those (one expert's alone may
    be small, and then rounding is most of it: 0.5 was seen). Allowed is twice that of autograd through transformers in the base's dtype,
    and 0.01.

    Returns:
        ok; error and budget of the gradients, loss_error and loss_budget.
    """
    drawn = [Drawn(index, one.prompts[0], one.shares[0]) for index, own in enumerate(examples) for one in own]
    losses, gradient = stepper.gradient(soft.to(base.device), drawn)
    ours = gradient.cpu().flatten(1), losses.view(len(soft), -1).mean(1, keepdim=True)
    exact = _autograd(base, torch.float32, soft, examples, placement)
    plain = exact if base.dtype == torch.float32 else _autograd(base, base.dtype, soft, examples, placement)
    error, loss_error = map(_apart, ours, exact)
    budget, loss_budget = (
        2 * _apart(rounded, wanted) + _SUMMATION for rounded, wanted in zip(plain, exact, strict=True)
    )
    ok = error <= budget and loss_error <= loss_budget
    return {"ok": ok, "error": error, "budget": budget, "loss_error": loss_error, "loss_budget": loss_budget}


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _autograd(
    base: Base, dtype: torch.dtype, soft: Tensor, examples: Sequence[Sequence[Example]], placement: str
) -> tuple[Tensor, Tensor]:
    """Every expert's gradient `[E, m * hidden]` and mean loss `[E, 1]` through transformers, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder(base.name), dtype=dtype)
    model.requires_grad_(False)
    gradients, losses = [], []
    for value, own in zip(soft, examples, strict=True):
        leaf = value.detach().cpu().float().requires_grad_()
        loss = torch.stack([_loss(model, leaf.to(dtype), example, placement) for example in own]).mean()
        gradients += torch.autograd.grad(loss, leaf)
        losses.append(loss.detach())
    return torch.stack(gradients).flatten(1), torch.stack(losses)[:, None]


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
        mask = torch.zeros(visible.shape, dtype=soft.dtype).masked_fill(~visible, torch.finfo(soft.dtype).min)[
            None, None
        ]
        logits = model(
            inputs_embeds=torch.cat((soft, context, tail))[None],
            attention_mask=mask,
            position_ids=torch.arange(length)[None],
        ).logits
    return torch.nn.functional.cross_entropy(logits[0, -len(answer) :].float(), answer)
