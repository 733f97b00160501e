"""Benchmarks: this engine and its kernels beside what a user would otherwise run, in one run, on the same data, checked before timed.

`measure` times and knows the machine's ceilings; `attention`, `peers` and `small_ops` lay out the kernels' work, `kernels` sweeps over
it; `llama` makes random models, `throughput` runs whole steps of them; `plot` draws, `targets` judges.
"""
