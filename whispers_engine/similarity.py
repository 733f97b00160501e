"""Where soft prompts lie: their norms, the base's tokens nearest to each virtual token, and how alike experts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .experts import Expert

_ROWS = 8192  # of the base's table at once: 128 MB of float32 at a width of 4096


@dataclass(frozen=True)
class Nearest:
    """What a pass over the base's token embeddings finds.

    Attributes:
        cosine: float32 `[m, k]`, largest first.
        ids: int64 `[m, k]`, the tokens.
        base_norm: mean Euclidean norm of the base's token embeddings.
    """

    cosine: Tensor
    ids: Tensor
    base_norm: float


def nearest_tokens(virtual: Tensor, table: Tensor, k: int = 3) -> Nearest:
    """The k tokens of the base whose embeddings have the largest cosine with each virtual token.

    Args:
        virtual: float32 `[m, hidden]`; m may be 0.
        table: `[V, hidden]`, the base's token embeddings, of any float dtype.
        k: at least 1; fewer where the vocabulary has fewer.
    """
    virtual = _unit(virtual)
    cosine = virtual.new_empty(len(virtual), 0)  # [m, up to k]
    ids = torch.empty(len(virtual), 0, dtype=torch.int64)
    total = 0.0
    for first in range(0, len(table), _ROWS):  # a whole table in float32 can be gigabytes
        rows = table[first : first + _ROWS].float()  # [rows, hidden]
        total += float(rows.norm(dim=-1).double().sum())
        cosine = torch.cat([cosine, virtual @ _unit(rows).T], dim=1)
        here = torch.arange(first, first + len(rows)).expand(len(virtual), -1)
        ids = torch.cat([ids, here], dim=1)
        cosine, best = cosine.topk(min(k, cosine.shape[1]), dim=1)
        ids = ids.gather(1, best)
    return Nearest(cosine.clamp(-1, 1), ids, total / len(table))


def expert_similarity(experts: Sequence[Expert]) -> Tensor:
    """Cosine between the experts' mean virtual tokens, float32 `[experts, experts]`. All are of kind "embeddings" and one width."""
    means = _unit(torch.stack([expert.embeddings.mean(dim=0) for expert in experts]))  # [experts, hidden]
    return (means @ means.T).clamp(-1, 1)


def _unit(rows: Tensor) -> Tensor:
    """Rows of norm 1; a row of zeros stays one, and is like nothing."""
    return torch.nn.functional.normalize(rows, dim=-1)
