"""C++ kernels for the CPU (`csrc/`): one function an operation, each with the arguments of its definition in `reference`.

Importing raises `Unavailable`, with the reason, where they were not built or the processor has none of their instruction sets.
"""

from .attention import committee_attention, tile_rows
from .library import Unavailable, bf16_step, isa, isas, num_threads, set_num_threads
from .small_ops import add_rms_norm, embed_rows, pool_logits, rms_norm, rope_and_store, silu_mul

__all__ = ["IMPLS", "Unavailable", "bf16_step", "isa", "isas", "num_threads", "set_num_threads"]

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
