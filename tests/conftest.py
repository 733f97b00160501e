"""One thread a test process: the processes share the cores, and tiny models gain nothing from more."""

import torch

torch.set_num_threads(1)
