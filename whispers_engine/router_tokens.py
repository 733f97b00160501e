"""Trains token routers: multinomial logistic regression on what all of a question's tokens say together.

Nothing says which token names the place: a question's score is the log of the sum over its tokens, so the fit finds out by itself which
tokens matter. What is held out, to choose the penalty and to calibrate, holds names that the rest does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

FOLDS = 4
PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3)  # on the squared weights of standardised states
_STEPS = 100


@dataclass(frozen=True)
class Tokens:
    """Questions' tokens, one after the other.

    Args:
        states: float64 `[tokens, hidden]`.
        of: int64 `[tokens]`, the question of each.
        count: questions.
    """

    states: Tensor
    of: Tensor
    count: int

    @classmethod
    def join(cls, states: Sequence[Tensor]) -> Tokens:
        lengths = torch.tensor([len(one) for one in states])
        of = torch.arange(len(states)).repeat_interleave(lengths)
        return cls(torch.cat(list(states)).double(), of, len(states))

    def part(self, chosen: Tensor) -> Tokens:
        """Of the questions where `chosen`, bool `[questions]`, is true."""
        mine = chosen[self.of]
        return Tokens(self.states[mine], (chosen.cumsum(0) - 1)[self.of[mine]], int(chosen.sum()))

    def scores(self, weight: Tensor) -> Tensor:
        """`[questions, columns]` of weights `[columns, hidden + 1]`: the log of the sum over a question's tokens."""
        said = self.states @ weight[:, :-1].T + weight[:, -1]
        of = self.of[:, None].expand_as(said)
        largest = torch.full((self.count, said.shape[1]), -torch.inf, dtype=said.dtype)
        largest = largest.scatter_reduce(0, of, said.detach(), "amax")
        return said.new_zeros(largest.shape).index_add(0, self.of, (said - largest[self.of]).exp()).log() + largest


@dataclass(frozen=True)
class Learned:
    """Weights `[columns, hidden + 1]` on standardised states, and the scores `[questions, columns]` of every question by weights that were
    learned without its fold."""

    weight: Tensor
    held_out: Tensor
    penalty: float


class Loss(Protocol):
    """A mean over the questions that are `chosen`, bool `[questions]`, of their scores `[chosen, columns]`."""

    def __call__(self, scores: Tensor, chosen: Tensor) -> Tensor: ...


def learn(
    tokens: Tokens,
    fold: Tensor,
    columns: int,
    loss: Loss,
    judge: Callable[[Tensor], float],
    tick: Callable[[], None],
    penalties: Sequence[float] = PENALTIES,
) -> Learned:
    """Learns from all questions, with the penalty that is best on what is held out.

    Args:
        tokens: standardised.
        fold: int64 `[questions]`, the fold of each.
        loss: what is made small, beside the penalty.
        judge: of held-out scores `[questions, columns]`; the penalty with the smallest is taken.
        tick: called after every fit, `ticks()` times.
        penalties: on the squared weights, the strongest first.
    """
    held_out = [torch.zeros(tokens.count, columns, dtype=torch.float64) for _ in penalties]
    starts = [torch.zeros(columns, tokens.states.shape[1] + 1, dtype=torch.float64) for _ in penalties]
    for index in range(FOLDS):
        out = fold == index
        rest, asked = tokens.part(~out), tokens.part(out)
        weight = torch.zeros_like(starts[0])
        for at, penalty in enumerate(penalties):  # each starts from where the one before it ended
            if rest.count:
                weight = _fit(rest, weight, partial(loss, chosen=~out), penalty)
            held_out[at][out] = asked.scores(weight)
            starts[at] = weight
            tick()
    best = min(range(len(penalties)), key=lambda at: judge(held_out[at]))
    everything = torch.ones(tokens.count, dtype=torch.bool)
    weight = _fit(tokens, starts[best], partial(loss, chosen=everything), penalties[best])
    tick()
    return Learned(weight, held_out[best], penalties[best])


def ticks() -> int:
    """How many fits `learn` makes."""
    return len(PENALTIES) * FOLDS + 1


def _fit(tokens: Tokens, start: Tensor, loss: Callable[..., Tensor], penalty: float) -> Tensor:
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=_STEPS, tolerance_change=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(scores=tokens.scores(weight)) + penalty * weight[:, :-1].square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return weight.detach()


def folds(names: Sequence[str]) -> Tensor:
    """The fold of each, int64, by a hash of its name: the same in every run."""
    return torch.tensor([int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % FOLDS for name in names])


def unstandardised(weight: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Weights `[columns, hidden + 1]` for states as the base has them, float32, that say what these say of standardised ones."""
    scaled = weight[:, :-1] / std
    return torch.cat([scaled, (weight[:, -1] - scaled @ mean)[:, None]], 1).float()


def calibrate(scores: Tensor, positive: Tensor, weights: Tensor) -> tuple[float, float, float]:
    """Scale and shift under which `sigmoid(scale * (score + shift))` says best what is positive, and how far it is off then.

    Args:
        scores: float64 `[questions]`, of what was held out.
        positive: bool `[questions]`.
        weights: float64 `[questions]`, of each.
    """
    values = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # log of the scale; scale * shift
    optimizer = torch.optim.LBFGS([values], max_iter=200, line_search_fn="strong_wolfe")
    # A little is kept off the certain ends: where all is told apart, no scale would be large enough.
    target = positive.double() * 0.98 + 0.01

    def off() -> Tensor:
        optimizer.zero_grad()
        said = values[0].exp() * scores + values[1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(said, target, weights, reduction="sum")
        value.backward()
        return value

    optimizer.step(off)
    scale = float(values[0].detach().exp())
    return scale, float(values[1].detach()) / scale, float(off().detach())
