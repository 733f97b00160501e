"""What is minimised, by the form of the data (docs/training.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Base
from .branch import option_scores
from .layout import Branch, Layout


def branch_losses(
    base: Base, layout: Layout, hidden: Tensor, branches: Sequence[Branch], shares: Sequence[Sequence[float]]
) -> Tensor:
    """The loss of every branch, float32 `[N]`.

    Options that compete: cross-entropy of the wanted shares against the softmax over their log-probabilities (`engine.score`'s). A free
    answer: the mean over its tokens, the end of turn among them, of the negative log-probability.

    Args:
        hidden: as `forward` gives it.
        shares: what every branch's options should have.
    """
    scores = option_scores(base, layout, hidden)
    count = torch.tensor(layout.options)
    widest = max(layout.options)
    real = (torch.arange(widest) < count[:, None]).to(scores.device)  # [N, K]
    padded = scores.new_full(real.shape, -torch.inf).masked_scatter(real, scores)
    target = torch.zeros(real.shape)
    for index, wanted in enumerate(shares):
        target[index, : len(wanted)] = torch.tensor(wanted)
    target = target.to(scores.device)
    competing = -(target * padded.log_softmax(-1).masked_fill(~real, 0.0)).sum(-1)
    if all(branch.prompt.compete for branch in branches):
        return competing
    compete = torch.tensor([branch.prompt.compete for branch in branches], device=scores.device)
    tokens = torch.tensor([len(branch.prompt.options[0]) for branch in branches], device=scores.device)
    return torch.where(compete, competing, -padded[:, 0] / tokens)
