"""One thread a test process: the processes share the cores, and tiny models gain nothing from more.

The width that xdist tells its workers is forgotten: a console made while it is set keeps it, whatever a test sets later.

Where there is no GPU, Triton kernels run under Triton's interpreter, which has to be chosen before Triton is first imported. It multiplies
tiles with numpy, whose library adds a row's products in another order for another number of rows on some processors, where a GPU's matrix
unit does not: the tests of a row's bits in any company need one order.
"""

import importlib.util
import os
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        import triton.runtime.interpreter as interpreter

        class InOrder:
            """numpy, but for a matrix product whose sums run in one order whatever the shape."""

            def __getattr__(self, name: str) -> Any:
                return getattr(np, name)

            @staticmethod
            def matmul(a: Any, b: Any, dtype: Any) -> Any:
                return np.einsum("ij,jk->ik", a, b, dtype=dtype, casting="unsafe")

        interpreter.np = InOrder()
os.environ.pop("COLUMNS", None)

import whispers_engine.cli.common  # noqa: E402, F401  makes the command's consoles
