"""C++ kernels for the CPU (`csrc/`): one function an operation, each with the arguments of its definition in `reference`.

Importing raises `Unavailable`, with the reason, where they were not built or the processor has none of their instruction sets.
"""

from .library import Unavailable, isa, isas, num_threads, set_num_threads
from .small_ops import silu_mul

__all__ = ["IMPLS", "Unavailable", "isa", "isas", "num_threads", "set_num_threads"]

IMPLS = {
    "silu_mul": silu_mul,
}
