"""What `verify` compares: for one case of one operation, results beside exact values and the error that each entry may have.

The budget of attention, row by row: twice the error of PyTorch's own attention on the same keys in the same dtype, plus one rounding of
the result to its dtype, plus four float32 roundings of the largest score or of 1 times the largest value. The other operations have
no such peer: one rounding to their dtype and eight float32 roundings of the numbers that are added or exponentiated.

Inputs and exact values are made on the CPU, so that a wrong device does not vouch for itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .ops import committee_attention, embed_rows, pool_logits, rms_norm, rope_and_store, silu_mul
from .verify_cases import FP8, Case, Setting, Step, inputs

ENTRIES_OF_32_BITS = 2**31
_EPS32 = torch.finfo(torch.float32).eps


class Part(NamedTuple):
    """Results beside what they should be. The last two broadcast to the first's shape."""

    actual: Tensor
    exact: Tensor
    budget: Tensor | float


class Wrong(Exception):
    """What a kernel did that no error in numbers tells."""


class Run(NamedTuple):
    """Where a check runs, and what."""

    impl: str
    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        """On the CPU, in the run's dtype."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


Parts = Iterator[tuple[str, list[Part]]]  # what the case's name is followed by, and what it compares


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that an entry which no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _rounded_once(exact: Tensor, dtype: torch.dtype, size: Tensor | None = None) -> Tensor:
    """Half a unit in the last place, plus eight float32 roundings of numbers of this `size` (default: the result's)."""
    info = torch.finfo(dtype)
    inner = 8 * _EPS32 / 2 * (exact if size is None else size).abs()
    return info.eps / 2 * exact.abs() + inner + info.smallest_normal * info.eps


# --- attention ---------------------------------------------------------------------------------------------------------------------


def attention(run: Run, case: Case) -> Parts:
    """The result and its log-sum-exp; then, for kernels, bits: some rows without their neighbours."""
    setting, step = case.setting, case.step
    cpu = inputs(step, setting, run.dtype, case.fp8)
    near = cpu.to(run.device)
    before = ENTRIES_OF_32_BITS // near.k_pages[0].numel() if case.far else 0
    with new_memory_is_nan():
        here = near.behind(before)

    def attend(step: Step, q: Tensor) -> tuple[Tensor, Tensor]:
        with new_memory_is_nan():
            return committee_attention(
                q,
                here.k_pages,
                here.v_pages,
                step.behind(before).plan(run.device),
                scale=setting.scale,
                window=setting.window,
                softcap=setting.softcap,
                k_scale=here.k_scale,
                v_scale=here.v_scale,
                return_lse=True,
                impl=run.impl,
            )  # type: ignore[return-value]

    out, lse = attend(step, here.q)
    exact, exact_lse = committee_attention(
        cpu.q.double(),
        cpu.k_pages,
        cpu.v_pages,
        step.plan(),
        scale=setting.scale,
        window=setting.window,
        softcap=setting.softcap,
        k_scale=cpu.k_scale,
        v_scale=cpu.v_scale,
        return_lse=True,
        impl="reference",
    )
    theirs, score, value = _pytorch(step, setting, here.q, *near.dequantised(run.dtype))
    peer_error = (theirs.cpu().double() - exact).abs().amax((1, 2))  # [R]
    band = torch.finfo(run.dtype).eps / 2 * exact.abs().amax((1, 2)) + 4 * _EPS32 * (1 + score) * value
    lse_budget = 2e-6 * exact_lse.abs() + 8 * _EPS32 * (1 + score)[:, None]
    yield "", [Part(out, exact, (2 * peer_error + band)[:, None, None]), Part(lse, exact_lse, lse_budget)]
    rows = case.alone()
    if run.impl in ("triton", "cpp") and rows:  # the reference's matrix products round by their shape
        alone, alone_lse = attend(step.keep(rows), here.q[rows])
        yield "rows alone", [Part(alone, out[rows], 0.0), Part(alone_lse, lse[rows], 0.0)]


def _pytorch(
    step: Step, setting: Setting, q: Tensor, k_pages: Tensor, v_pages: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own attention in q's dtype, on gathered keys; it has no softcap: there, its softmax.

    Returns the result, and of every row its largest score and value: `[R, Hq, D]`, `[R]` and `[R]`, the last two on the CPU.
    Rows that see nothing are zeros.
    """
    out, largest = torch.zeros_like(q), torch.zeros(2, q.shape[0], dtype=torch.float64)
    scale = setting.dim**-0.5 if setting.scale is None else setting.scale
    position = torch.tensor(step.positions)
    for begin, end, segments in step.blocks():
        slots, key_position = step.keys(segments)  # [K]
        seen = key_position <= position[begin:end, None]  # [r, K]
        if setting.window is not None:
            seen &= key_position > position[begin:end, None] - setting.window
        rows = begin + torch.nonzero(seen.any(1))[:, 0]
        if rows.numel() == 0:
            continue
        mask, slots, x = (
            seen[seen.any(1)].to(q.device),
            slots.to(q.device),
            q[rows.to(q.device)].transpose(0, 1),
        )  # [Hq, r, D]
        k, v = (
            pages.flatten(0, 1)[slots].repeat_interleave(setting.group, 1).transpose(0, 1)
            for pages in (k_pages, v_pages)
        )  # [Hq, K, D]
        scores = torch.matmul(x, k.mT) * scale  # [Hq, r, K]
        if setting.softcap is None:
            result = F.scaled_dot_product_attention(x[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
        else:
            scores = setting.softcap * torch.tanh(scores / setting.softcap)
            result = torch.matmul(scores.masked_fill(~mask, -math.inf).softmax(-1), v)
        out[rows.to(q.device)] = result.transpose(0, 1)
        largest[0, rows] = scores.masked_fill(~mask, 0.0).abs().amax((0, 2)).double().cpu()
        largest[1, rows] = v.abs().max().double().cpu()
    return out, largest[0], largest[1]


# --- the small operations ----------------------------------------------------------------------------------------------------------


def embedding(run: Run, ids: list[int], vocabulary: int, hidden: int, soft: int) -> Parts:
    """Rows are copied, bit for bit."""
    table = run.normal(vocabulary, hidden)
    virtual = torch.randn(soft, hidden, generator=torch.Generator().manual_seed(1)) if soft > 0 else None
    both = table if virtual is None else torch.cat((table, virtual.to(run.dtype)))
    chosen = torch.tensor(ids, dtype=torch.int64) % both.shape[0]
    with new_memory_is_nan():
        there = None if virtual is None else virtual.to(run.device)
        out = embed_rows(chosen.to(run.device), table.to(run.device), there, impl=run.impl)
    yield "", [Part(out, both[chosen], 0.0)]


def norm(run: Run, shape: tuple[int, ...], residual: bool, eps: float = 1e-6) -> Parts:
    x, other, weight = (run.normal(*size, seed=seed) for seed, size in enumerate((shape, shape, shape[-1:])))
    if shape[0] > 1:
        x[-1] = 0
    there = other.to(run.device) if residual else None
    with new_memory_is_nan():
        found = rms_norm(x.to(run.device), weight.to(run.device), eps, there, impl=run.impl)
    parts = []
    if isinstance(found, tuple):
        out, total = found
        exact_total = x.double() + other.double()
        parts.append(Part(total, exact_total, _rounded_once(exact_total, run.dtype)))
        x = total.cpu()  # what is normalised is the sum as it is returned
    else:
        out = found
    exact = reference.rms_norm(x.double(), weight.double(), eps)
    yield "", [*parts, Part(out, exact, _rounded_once(exact, run.dtype))]


def gated(run: Run, rows: int, width: int) -> Parts:
    gate_up = 3 * run.normal(rows, 2 * width)
    gate_up[0, 0], gate_up[-1, width - 1] = 40, -40
    with new_memory_is_nan():
        out = silu_mul(gate_up.to(run.device), impl=run.impl)
    exact = reference.silu_mul(gate_up.double())
    # A rounding of the gate is one of the exponent: the error of exp grows with it.
    yield "", [Part(out, exact, _rounded_once(exact, run.dtype, exact * (1 + gate_up[:, :width].double().abs())))]


def pooling(run: Run, vocabulary: int, sizes: tuple[int, ...], rule: str) -> Parts:
    """Groups of these sizes. In each of two or more rows one weighs 0 and holds NaN, another rules a token out."""
    rows = sum(sizes)
    logits, shares = (
        4 * run.normal(rows, vocabulary),
        torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.1,
    )
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    size = torch.zeros(len(sizes), 1, dtype=torch.float64)  # largest logit of a group
    for group, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if end - begin > 1:
            logits[begin], shares[begin] = math.nan, 0.0
            if vocabulary > 1:
                logits[end - 1, vocabulary // 2] = -math.inf
        shares[begin:end] /= shares[begin:end].sum()
        size[group] = logits[begin:end].double().nan_to_num(0.0, neginf=0.0).abs().max()
    pointer = bounds.int()
    with new_memory_is_nan():
        out = pool_logits(logits.to(run.device), shares.to(run.device), pointer.to(run.device), rule, impl=run.impl)
    exact = reference.pool_logits(logits.double(), shares, pointer, rule).double()
    yield "", [Part(out, exact, _rounded_once(exact, torch.float32, 1 + size + exact.abs()))]


def rope(run: Run, positions: list[int], heads: int, kv_heads: int, dim: int, page_size: int, fp8: bool) -> Parts:
    """q, k and v are slices of one matrix, as a model has them. Every third row is not stored; the pool is compared bit for bit."""
    rows = len(positions)
    qkv = run.normal(rows, heads + 2 * kv_heads, dim)
    qkv[0, -1] = 0  # its fp8 scale must not be 0
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    theta = torch.tensor(positions).double()[:, None] * 10000.0 ** (-torch.arange(dim // 2).double() / (dim / 2))
    cos, sin = theta.cos().float(), theta.sin().float()
    pages = -(-rows // page_size) + 2
    slots = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(1))[:rows]
    slots[2::3] = -1
    store = torch.full((pages, page_size, kv_heads, dim), math.nan).to(FP8 if fp8 else run.dtype)
    scale = torch.full(store.shape[:3], math.nan) if fp8 else None
    pools = [None if x is None else x.to(run.device, copy=True) for x in (store, store, scale, scale)]
    k_pages, v_pages, k_scale, v_scale = pools
    q_there, k_there, v_there = qkv.to(run.device).split((heads, kv_heads, kv_heads), dim=1)
    with new_memory_is_nan():
        out = rope_and_store(
            q_there,
            k_there,
            v_there,
            cos.to(run.device),
            sin.to(run.device),
            slots.to(run.device),
            k_pages,  # type: ignore[arg-type]
            v_pages,  # type: ignore[arg-type]
            k_scale=k_scale,
            v_scale=v_scale,
            impl=run.impl,
        )

    def rotated(x: Tensor) -> tuple[Tensor, Tensor]:
        """Exact, and the largest sum of products that rotation could give: a pair's length."""
        first, second = x.double().chunk(2, dim=-1)
        length = torch.hypot(first, second)
        return reference.rotate(x.double(), cos, sin), torch.cat((length, length), dim=-1)

    exact_q, size_q = rotated(q)
    exact_k, size_k = rotated(k)
    parts = [Part(out, exact_q, _rounded_once(exact_q, run.dtype, size_q))]
    kept = slots >= 0
    slots = slots[kept]
    after = [None if x is None else x.cpu().flatten(0, 1) for x in pools]
    for name, pool, before in zip(
        ("k_pages", "v_pages", "k_scale", "v_scale"), after, (store, store, scale, scale), strict=True
    ):
        if pool is not None and before is not None:
            strange = (pool.view(torch.uint8) != before.flatten(0, 1).view(torch.uint8)).flatten(1).any(1)  # [slots]
            strange[slots] = False
            if bool(strange.any()):
                raise Wrong(f"{name}: slot {int(strange.nonzero()[0])} is no row's, and was written")
    for index, exact, error in (
        (0, exact_k[kept], _rounded_once(exact_k, run.dtype, size_k)[kept]),
        (1, v.double()[kept], torch.zeros_like(v.double()[kept])),
    ):
        stored, scales = after[index], after[index + 2]
        assert stored is not None
        if scales is None:
            parts.append(Part(stored[slots], exact, error))
            continue
        factor = scales[slots].double()[..., None]  # [r, Hkv, 1]
        largest = exact.abs().amax(-1, keepdim=True)
        exact_scale = torch.where(largest > 0, largest / reference.FP8_MAX, 1.0)
        parts.append(Part(factor, exact_scale, (torch.finfo(run.dtype).eps + 8 * _EPS32) * exact_scale))
        # e4m3 has three bits of mantissa, down to a step of 2^-9 scales.
        coarse = 1.001 * torch.maximum(exact.abs() / 16, exact_scale / 1024)
        parts.append(Part(stored[slots].double() * factor, exact, coarse + error))
    yield "", parts
