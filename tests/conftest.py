"""One thread a test process: the processes share the cores, and tiny models gain nothing from more.

The width that xdist tells its workers is forgotten: a console made while it is set keeps it, whatever a test sets later.

Where there is no GPU, Triton kernels run under Triton's interpreter, which has to be chosen before Triton is first imported.
"""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("COLUMNS", None)

import whispers_engine.cli.common  # noqa: E402, F401  makes the command's consoles
