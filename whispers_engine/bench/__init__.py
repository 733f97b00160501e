"""Benchmarks: this engine and its kernels beside what a user would otherwise run, in one run, on the same data, checked before timed.

`measure` times and knows the machine's ceilings; `attention`, `peers` and `small_ops` lay out the kernels' work, `kernels` sweeps over
it. `llama` makes random models, `throughput` runs whole steps of them; `base` runs a real one: `committee` is ours, `hf` and `llamacpp`
are the peers, which `field` sets up and judges, `gguf_file` writes the base for llama.cpp, `work` counts what is necessary. `contest`
lets everybody run in turn; `plot` draws, `targets` judges.
"""
