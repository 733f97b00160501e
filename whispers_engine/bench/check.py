"""Whether a result may be timed: how far it is from float64, and how far it may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Ours is held to the house's rule: twice PyTorch's own error, plus the band. A peer is timed until it is plainly wrong, since leaving
# out a fast one for its rounding would flatter us.
OURS, PEER = 2.0, 8.0
_SUMMATION = 1e-3  # what two correct orders of summation differ by in a whole model, in float32


class Verdict(NamedTuple):
    """Largest absolute error and what is allowed of it. NaN is never allowed."""

    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget


def judge(actual: Tensor, exact: Tensor, plain: Tensor, band: float, times: float = OURS) -> Verdict:
    """Compares a result with the exact one.

    Args:
        actual: what was computed, any float dtype.
        exact: the same in float64.
        plain: what PyTorch computes in `actual`'s dtype; its error is the measure.
        band: what rounding may add, beside half a unit in the last place of the largest result.
        times: how many times PyTorch's own error is accepted.
    """
    if actual.shape != exact.shape:
        return Verdict(float("nan"), 0.0)
    own = float((plain.double() - exact).abs().max())
    last_place = torch.finfo(actual.dtype).eps / 2 * float(exact.abs().max())
    return Verdict(float((actual.double() - exact).abs().max()), times * own + last_place + band)


def judge_tokens(
    tokens: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    exact: Tensor,
    plain: Tensor,
    dtype: torch.dtype,
    own: Tensor | None = None,
) -> dict[str, Any]:
    """Whether greedy tokens are as likely as their log-probabilities say, and no better one was passed over.

    Two errors have a budget: the largest, since one wrong branch must show, twice transformers' own in this dtype plus one rounding of
    the largest logit to it (in float32 1e-3, since transformers in float32 is what we compare with); and the root of the mean square,
    which chance moves less, twice transformers' plus 1e-3. Few tokens have a mean that says little: 32 and more are meant.

    Args:
        tokens, logprobs: what was generated, `[E][n]`.
        exact: float32 `[E, n, V]`, the distributions that these tokens were chosen from, as transformers finds them in float32.
        plain: the same in `dtype`.
        own: `exact` with the weights that were meant, where those are not the base's (int8); None: `exact`.

    Returns:
        ok, error, budget, rms, rms_budget, and passed_over: by how much the best token was likelier than the chosen one, at most.
    """
    chosen = torch.tensor(tokens, device=exact.device)[..., None]  # [E, n, 1]
    plain_error = plain.gather(-1, chosen) - exact.gather(-1, chosen)
    wanted = exact if own is None else own
    truth = wanted.gather(-1, chosen)[..., 0]
    errors = torch.tensor(logprobs, device=exact.device) - truth
    error, rms = float(errors.abs().max()), _rms(errors)
    passed_over = by_how_much(wanted, tokens)
    budget = OURS * float(plain_error.abs().max()) + rounding(exact, dtype)
    rms_budget = OURS * _rms(plain_error) + _SUMMATION
    ok = error <= budget and rms <= rms_budget and passed_over <= 2 * budget
    return {
        "ok": ok,
        "error": error,
        "budget": budget,
        "rms": rms,
        "rms_budget": rms_budget,
        "passed_over": passed_over,
    }


def by_how_much(exact: Tensor, tokens: Sequence[Sequence[int]]) -> float:
    """How much likelier than the chosen tokens `[E][n]` better ones were, at most; `exact`: the distributions `[E, n, V]`."""
    chosen = torch.tensor(tokens, device=exact.device)[..., None]
    return float((exact.amax(-1) - exact.gather(-1, chosen)[..., 0]).max())


def _rms(errors: Tensor) -> float:
    return float(errors.double().square().mean().sqrt())


def rounding(logprobs: Tensor, dtype: torch.dtype) -> float:
    """One rounding of the largest logit to a dtype; in float32, what two orders of summation differ by."""
    if dtype == torch.float32:
        return _SUMMATION
    return torch.finfo(dtype).eps * float((logprobs.amax(-1) - logprobs.amin(-1)).max())
