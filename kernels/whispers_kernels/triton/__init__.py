"""Triton kernels: one file an operation, each with the arguments of its definition in `reference`."""

from .attention import committee_attention, tile_rows
from .embed_rows import embed_rows
from .pool_logits import pool_logits
from .rms_norm import add_rms_norm, rms_norm
from .rope_and_store import rope_and_store
from .silu_mul import silu_mul

IMPLS = {
    "tile_rows": tile_rows,
    "committee_attention": committee_attention,
    "embed_rows": embed_rows,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rope_and_store": rope_and_store,
    "silu_mul": silu_mul,
    "pool_logits": pool_logits,
}
