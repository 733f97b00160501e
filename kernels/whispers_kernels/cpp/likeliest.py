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

    The log-probability has the bits that `pool_logits` gives a pool of that row alone; NaN where that is NaN.

    Raises:
        ValueError: another shape, no vocabulary, or another dtype than float32, bfloat16 and float16.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: {list(logits.shape)}; accepted: [rows, vocabulary], at least one token")
    logits = dense(logits)
    rows, vocabulary = logits.shape
    return _of(_NO_HEAD, logits, rows, vocabulary, dtype_of(logits))


def likeliest_of(head: PackedLinear, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the float32 logits that `head` makes of hidden states `[R, K]`, which are never written whole."""
    hidden = dense(hidden)
    return _of(head.product(hidden, None, None), None, hidden.shape[0], head.columns, 0)


def _of(head: tuple[int, ...], logits: Tensor | None, rows: int, vocabulary: int, dtype: int) -> tuple[Tensor, Tensor]:
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    stride = 0 if logits is None else logits.stride(0)
    _likeliest(*head, *map(address, (logits, tokens, logprobs)), rows, vocabulary, stride, dtype)
    return tokens, logprobs
