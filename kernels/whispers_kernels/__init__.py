"""Kernels for committees of soft-prompt experts: one attention over shared pages, and its neighbours in a decoder layer.

Stands alone: needs torch, knows nothing of the engine. `ops` holds the public functions, `plan` the table of segments they take,
`reference` the definition of every result.
"""

from .ops import available_impls, committee_attention, embed_rows, pool_logits, rms_norm, rope_and_store, silu_mul
from .plan import Plan, Segment

__all__ = [
    "Plan",
    "Segment",
    "available_impls",
    "committee_attention",
    "embed_rows",
    "pool_logits",
    "rms_norm",
    "rope_and_store",
    "silu_mul",
]
