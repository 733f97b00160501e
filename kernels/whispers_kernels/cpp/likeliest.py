"""The likeliest token of each row: `csrc/likeliest.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import address, dense, dtype_of, operation
from .linear import PackedLinear

_likeliest = operation("likeliest", "27q")
_NO_HEAD = (0,) * 20


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's likeliest token, int64 `[R]` (of equal ones the first), and its log-probability, float32 `[R]`, of logits `[R, V]`.

    The log-probability has the bits that `pool_logits` gives a pool of that row alone.
    """
    return _of(_NO_HEAD, dense(logits))


def likeliest_of(head: PackedLinear, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the float32 logits of hidden states `[R, K]`, which `head` makes of them in the same call."""
    hidden = dense(hidden)
    logits = torch.empty(hidden.shape[0], head.columns, dtype=torch.float32)
    return _of(head.product(hidden, None, logits), logits)


def _of(head: tuple[int, ...], logits: Tensor) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    pointers = address(logits), address(tokens), address(logprobs)
    _likeliest(*head, *pointers, rows, vocabulary, logits.stride(0), dtype_of(logits))
    return tokens, logprobs
