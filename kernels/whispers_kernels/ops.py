"""The public operations: every check of an argument, the choice of an implementation, and the registration with torch, once for all.

Each function `f` checks its arguments and calls the torch operator `whispers::f`, whose body looks up the implementation by name.
A named implementation never falls back to another: it works or it raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import reference
from .plan import Plan

POOL_RULES = ("mixture", "product")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FP8 = torch.float8_e4m3fn

# implementation -> operation -> function. A backend is imported, and its entry made, when it is first asked for.
_IMPLS: dict[str, dict[str, Callable[..., Any]]] = {"reference": dict(reference.IMPLS)}
# What "auto" tries for tensors on a device, in this order. Interpreted Triton is for checking, never for speed.
_PREFERENCE = {"cuda": ("triton", "reference"), "cpu": ("cpp", "reference")}


def _triton_is_here() -> bool:
    """Triton runs on a GPU, or anywhere when the environment asks for its interpreter before Python starts."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _cpp() -> dict[str, Callable[..., Any]] | str:
    """The C++ kernels, or why there are none."""
    try:
        return importlib.import_module("whispers_kernels.cpp").IMPLS
    except ImportError as error:
        return str(error)


def _load(impl: str) -> bool:
    """Whether this machine has an implementation; imports it where it has."""
    if impl == "triton" and impl not in _IMPLS and _triton_is_here():
        _IMPLS[impl] = importlib.import_module("whispers_kernels.triton").IMPLS
    if impl == "cpp" and impl not in _IMPLS and isinstance(found := _cpp(), dict):
        _IMPLS[impl] = found
    return impl in _IMPLS


def _hint(impl: str) -> str:
    """Why a known implementation is not here."""
    if impl == "triton":
        return "; triton without a GPU needs TRITON_INTERPRET=1 in the environment"
    reason = _cpp() if impl == "cpp" else ""
    return f"; {reason}" if isinstance(reason, str) and reason else ""


def available_impls() -> tuple[str, ...]:
    """Names that `impl=` accepts on this machine, beside "auto"."""
    return tuple(name for name in ("triton", "cpp", "reference") if _load(name))


def check_impl(impl: str, device: torch.device | str = "cpu") -> str:
    """Returns the implementation that `impl` stands for, "auto" on this device. Raises ValueError for one that is not here."""
    if impl == "auto":
        order = _PREFERENCE.get(torch.device(device).type, ("reference",))
        return next(name for name in order if _load(name))
    if not _load(impl):
        raise ValueError(
            f"impl={impl!r} is not available here; accepted: auto, {', '.join(available_impls())}{_hint(impl)}"
        )
    return impl


def tile_rows(impl: str, q: torch.dtype, pages: torch.dtype, group: int, dim: int, device: torch.device) -> int | None:
    """Rows of the tiles that an implementation's attention wants a plan cut into; None: it takes the plan as it is.

    Args:
        q, pages: dtypes; group: query heads a KV head; dim: of a head.
    """
    choose = _IMPLS[impl].get("tile_rows")
    return None if choose is None else choose(q, pages, group, dim, device)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check_float(name: str, tensor: Tensor) -> None:
    _require(tensor.dtype in _FLOATS, f"{name}: dtype {tensor.dtype}; accepted: {', '.join(map(str, _FLOATS))}")


def _may_read(tensor: Tensor) -> bool:
    """Whether its numbers are checked: not on a GPU, which the host would have to wait for, nor while torch.compile traces."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(name: str, numbers: Tensor, least: int, after: int) -> None:
    if _may_read(numbers) and numbers.numel() > 0:
        low, high = (int(number) for number in torch.aminmax(numbers))
        _require(least <= low and high < after, f"{name}: {low} to {high}; accepted: {least} to {after - 1}")


def _check_pages(
    k_pages: Tensor, v_pages: Tensor, heads: int, dim: int, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """`heads` is the number of KV heads wanted."""
    _require(
        k_pages.dim() == 4 and k_pages.shape == v_pages.shape and k_pages.dtype == v_pages.dtype,
        f"k_pages {_shape(k_pages)} and v_pages {_shape(v_pages)} must both be [pages, page_size, kv_heads, head_dim]",
    )
    _require(
        k_pages.shape[2:] == (heads, dim),
        f"k_pages {_shape(k_pages)}: accepted here are {heads} kv_heads of head_dim {dim}",
    )
    if k_pages.dtype == _FP8:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            found = "none" if scale is None else _shape(scale)
            _require(
                scale is not None and scale.shape == k_pages.shape[:3] and scale.dtype == torch.float32,
                f"{name}: {found}; fp8 pages need float32 {list(k_pages.shape[:3])}",
            )
    else:
        _check_float("k_pages", k_pages)
        _require(k_scale is None and v_scale is None, f"k_scale and v_scale are for fp8 pages, not {k_pages.dtype}")


def committee_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every row over the union of the segments that see it; shared keys are named once, never copied.

    Row `i` of segment `g` sees its key `j` iff `key_begin[g] + j <= position[i]` (and `> position[i] - window`). For one request
    with two `suffix` experts, `E1` and `E2` being their own pages, the mask of a decode step is::

                context pages   E1   E2
        row 0   x x x x x x x   x x
        row 1   x x x x x x x        x x

    Args:
        q: `[R, Hq, D]` rotated queries, float32, bfloat16, float16 or float64.
        k_pages, v_pages: `[N, page_size, Hkv, D]`, one layer of the pool, keys rotated; a float dtype or float8_e4m3fn.
        plan: the segments and row positions of this step.
        scale: factor on the scores; `D ** -0.5` by default.
        window: how many keys back a row sees, itself included; None: all.
        softcap: `softcap * tanh(score / softcap)` is applied before the mask; None: not.
        k_scale, v_scale: float32 `[N, page_size, Hkv]`, needed by and only by fp8 pages.
        return_lse: also return the log-sum-exp of the scores.
        impl: "auto", "reference", or another of `available_impls()`.

    Returns:
        `[R, Hq, D]` in q's dtype; a key named by two segments counts twice; a row that sees nothing gives zeros. With `return_lse`
        also float32 `[R, Hq]`, natural log, -inf for such a row. A value that is not finite makes NaN of the rows that see its key; a
        compiled kernel may extend that to other rows of a segment that names the key, where it is in one block with keys that they
        see: earlier rows, and with a window also later ones, which have left it behind; never to rows that see no such segment.
        Where a score is +inf, or a sum of weighted values leaves float32 on its way, result and log-sum-exp are NaN or infinite, in
        each implementation in its own way.

    Raises:
        ValueError: shapes, dtypes or scales that do not fit, no heads, a plan for other rows, or pages beyond the pool.
    """
    _require(q.dim() == 3 and 0 not in q.shape[1:], f"q: {_shape(q)}; accepted: [rows, q_heads, head_dim], heads not 0")
    _check_float("q", q)
    _require(k_pages.dim() == 4, f"k_pages: {_shape(k_pages)}; accepted: [pages, page_size, kv_heads, head_dim]")
    kv_heads = k_pages.shape[2]
    _check_pages(k_pages, v_pages, kv_heads, q.shape[2], k_scale, v_scale)
    _require(
        kv_heads > 0 and q.shape[1] % kv_heads == 0, f"q: {q.shape[1]} q_heads are no multiple of {kv_heads} kv_heads"
    )
    _require(plan.num_rows == q.shape[0], f"plan: {plan.num_rows} rows for a q of {q.shape[0]}")
    _require(
        plan.pages_needed <= k_pages.shape[0],
        f"plan: names page {plan.pages_needed - 1}; the pool has {k_pages.shape[0]} pages",
    )
    _require(
        plan.page_size_needed <= k_pages.shape[1],
        f"plan: a segment is longer than its pages of {k_pages.shape[1]} keys; it needs pages of {plan.page_size_needed}",
    )
    _require(plan.position.device == q.device, f"plan: on {plan.position.device}; accepted: q's device, {q.device}")
    _require(window is None or window >= 1, f"window: {window}; accepted: None or at least 1")
    _require(softcap is None or softcap > 0, f"softcap: {softcap}; accepted: None or above 0")
    impl = check_impl(impl, q.device)
    rows = tile_rows(impl, q.dtype, k_pages.dtype, q.shape[1] // kv_heads, q.shape[2], q.device)
    work = None if rows is None else plan.work(rows)
    out, lse = torch.ops.whispers.committee_attention(
        q,
        k_pages,
        v_pages,
        plan.position,
        plan.page_ptr,
        plan.pages,
        plan.length,
        plan.key_begin,
        plan.row_begin,
        plan.row_end,
        q.shape[2] ** -0.5 if scale is None else float(scale),
        window,
        softcap,
        k_scale,
        v_scale,
        [] if work is None else work.tensors,
        [] if work is None else [work.tile_rows, work.slots, int(work.in_place)],
        impl,
    )
    return (out, lse) if return_lse else out


def embed_rows(ids: Tensor, table: Tensor, soft: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Token embeddings and soft-prompt rows in one gather.

    Args:
        ids: int64 `[R]`; below `V` a row of `table`, from `V` on row `ids - V` of `soft`. On a GPU the caller keeps them in range:
            they are not read to be checked.
        table: `[V, hidden]`, any float dtype.
        soft: `[P, hidden]` virtual token embeddings, or None. They are rounded to the table's dtype.

    Returns:
        `[R, hidden]` in the table's dtype.

    Raises:
        ValueError: ids that are not int64 `[R]` or, on the CPU, name no row; dtypes or widths that do not fit.
    """
    _require(ids.dim() == 1 and ids.dtype == torch.int64, f"ids: {_shape(ids)}; accepted: int64 [rows]")
    _require(table.dim() == 2, f"table: {_shape(table)}; accepted: [vocabulary, hidden]")
    _check_float("table", table)
    if soft is not None:
        _require(
            soft.dim() == 2 and soft.shape[1] == table.shape[1],
            f"soft: {_shape(soft)}; accepted: [virtual tokens, {table.shape[1]}], as wide as the table",
        )
        _check_float("soft", soft)
    _check_range("ids", ids, 0, table.shape[0] + (0 if soft is None else soft.shape[0]))
    return torch.ops.whispers.embed_rows(ids, table, soft, check_impl(impl, table.device))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, impl: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation of the last dimension, after adding a residual where one is given.

    Args:
        x: `[..., D]`, any float dtype.
        weight: `[D]`, any float dtype.
        eps: added to the mean square.
        residual: like x, or None.

    Returns:
        `rms_norm(x)`; with a residual the pair `(rms_norm(x + residual), x + residual)`. x's shape and dtype.

    Raises:
        ValueError: a weight of another width, a residual of another shape or dtype, another dtype.
    """
    _check_float("x", x)
    _check_float("weight", weight)
    _require(weight.shape == x.shape[-1:], f"weight: {_shape(weight)}; accepted: [{x.shape[-1]}], x's last dimension")
    if residual is None:
        return torch.ops.whispers.rms_norm(x, weight, eps, check_impl(impl, x.device))
    _require(
        residual.shape == x.shape and residual.dtype == x.dtype, f"residual: {_shape(residual)}; accepted: {_shape(x)}"
    )
    return torch.ops.whispers.add_rms_norm(x, weight, eps, residual, check_impl(impl, x.device))


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Rotates q and k by their positions and writes k and v into the pool, in place.

    Args:
        q: `[R, Hq, D]`, not rotated; any float dtype.
        k, v: `[R, Hkv, D]`, in q's dtype.
        cos, sin: float32 (or q's dtype) `[R, D/2]`, of each row's position; half-split layout, as transformers has it.
        slots: int64 `[R]`, `page * page_size + offset` for each row's key; -1: not stored. No slot twice. On a GPU the caller keeps
            them within the pool: they are not read to be checked.
        k_pages, v_pages: `[N, page_size, Hkv, D]`, written.
        k_scale, v_scale: float32 `[N, page_size, Hkv]`, written; needed by and only by fp8 pages. Of a head of a token the largest
            magnitude / 448: infinite with an infinity, 1 where that is 0 or a NaN is among the numbers. What does not fit e4m3 once
            divided is ±448, an infinity NaN.

    Returns:
        The rotated q, `[R, Hq, D]`.

    Raises:
        ValueError: shapes, dtypes or scales that do not fit, no heads, or, on the CPU, slots beyond the pool.
    """
    _require(
        q.dim() == 3 and q.shape[2] % 2 == 0 and 0 not in q.shape[1:],
        f"q: {_shape(q)}; accepted: [rows, q_heads, an even head_dim], heads not 0",
    )
    _check_float("q", q)
    rows, _, dim = q.shape
    _require(
        k.dim() == 3
        and k.shape[1] > 0
        and k.shape == v.shape
        and (k.shape[0], k.shape[2]) == (rows, dim)
        and k.dtype == v.dtype == q.dtype,
        f"k {_shape(k)} and v {_shape(v)} must both be [{rows}, kv_heads, {dim}] in q's dtype",
    )
    _require(
        cos.shape == sin.shape == (rows, dim // 2),
        f"cos {_shape(cos)} and sin {_shape(sin)}; accepted: [{rows}, {dim // 2}]",
    )
    _check_float("cos", cos)
    _check_float("sin", sin)
    _require(slots.shape == (rows,) and slots.dtype == torch.int64, f"slots: {_shape(slots)}; accepted: int64 [{rows}]")
    _check_pages(k_pages, v_pages, k.shape[1], dim, k_scale, v_scale)
    _check_range("slots", slots, -1, k_pages.shape[0] * k_pages.shape[1])
    return torch.ops.whispers.rope_and_store(
        q, k, v, cos, sin, slots, k_pages, v_pages, k_scale, v_scale, check_impl(impl, q.device)
    )


def silu_mul(gate_up: Tensor, *, impl: str = "auto") -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate_up: `[R, 2 * I]`, gate first, any float dtype.

    Returns:
        `[R, I]` in the same dtype.

    Raises:
        ValueError: not two dimensions, or an odd width.
    """
    _require(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, f"gate_up: {_shape(gate_up)}; accepted: [rows, 2 * I]")
    _check_float("gate_up", gate_up)
    return torch.ops.whispers.silu_mul(gate_up, check_impl(impl, gate_up.device))


def pool_logits(logits: Tensor, weights: Tensor, group_ptr: Tensor, rule: str, *, impl: str = "auto") -> Tensor:
    """Makes one next-token distribution of each group's: the linear or the logarithmic opinion pool (Genest and Zidek, 1986).

    Args:
        logits: `[R, V]`, any float dtype.
        weights: float32 `[R]`, not negative, summing to one in each group. A weight of 0 leaves its row out.
        group_ptr: int32 `[C+1]`, ascending within `[0, R]`; group c is rows `[group_ptr[c], group_ptr[c+1])`. On a GPU the caller
            keeps it so: it is not read to be checked.
        rule: "mixture", `log sum_e w_e p_e`; or "product", `log_softmax(sum_e w_e log p_e)`.

    Returns:
        Log-probabilities, float32 `[C, V]`. A `product` that rules every token out is -inf throughout.

    Raises:
        ValueError: shapes or dtypes that do not fit, another rule, or, on the CPU, a `group_ptr` that does not ascend within `[0, R]`.
    """
    _require(logits.dim() == 2, f"logits: {_shape(logits)}; accepted: [rows, vocabulary]")
    _check_float("logits", logits)
    _require(
        weights.shape == logits.shape[:1] and weights.dtype == torch.float32,
        f"weights: {_shape(weights)}; accepted: float32 [{logits.shape[0]}]",
    )
    _require(
        group_ptr.dim() == 1 and group_ptr.dtype == torch.int32 and group_ptr.shape[0] >= 1,
        f"group_ptr: {_shape(group_ptr)}; accepted: int32 [groups + 1]",
    )
    if _may_read(group_ptr):
        bounds = group_ptr.tolist()
        _require(
            all(begin <= end for begin, end in pairwise([0, *bounds, logits.shape[0]])),
            f"group_ptr: {bounds}; accepted: ascending from 0 to {logits.shape[0]}",
        )
    _require(rule in POOL_RULES, f"rule: {rule!r}; accepted: {', '.join(POOL_RULES)}")
    return torch.ops.whispers.pool_logits(logits, weights, group_ptr, rule, check_impl(impl, logits.device))


# --- registration with torch -------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("whispers", "DEF")
_PLAN = (
    "Tensor position, Tensor page_ptr, Tensor pages, Tensor length, Tensor key_begin, Tensor row_begin, Tensor row_end"
)


def _register(schema: str, fake: Callable[..., Any]) -> None:
    """Defines `whispers::name`: its last argument names the implementation; `fake` gives the result's shape and dtype."""
    name = schema.split("(")[0]

    def run(*args: Any) -> Any:
        return _IMPLS[args[-1]][name](*args[:-1])

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"whispers::{name}", fake, lib=_LIBRARY)


def _fake_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=torch.float32)


_register(
    f"committee_attention(Tensor q, Tensor k_pages, Tensor v_pages, {_PLAN}, float scale, SymInt? window, float? softcap, "
    "Tensor? k_scale, Tensor? v_scale, Tensor[] work, int[] sizes, str impl) -> (Tensor, Tensor)",
    _fake_attention,
)
_register(
    "embed_rows(Tensor ids, Tensor table, Tensor? soft, str impl) -> Tensor",
    lambda ids, table, soft, impl: table.new_empty(ids.shape[0], table.shape[1]),
)
_register(
    "rms_norm(Tensor x, Tensor weight, float eps, str impl) -> Tensor",
    lambda x, weight, eps, impl: torch.empty_like(x),
)
_register(
    "add_rms_norm(Tensor x, Tensor weight, float eps, Tensor residual, str impl) -> (Tensor, Tensor)",
    lambda x, weight, eps, residual, impl: (torch.empty_like(x), torch.empty_like(x)),
)
_register(
    "rope_and_store(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) k_pages, Tensor(b!) v_pages, "
    "Tensor(c!)? k_scale, Tensor(d!)? v_scale, str impl) -> Tensor",
    lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format),
)
_register(
    "silu_mul(Tensor gate_up, str impl) -> Tensor",
    lambda gate_up, impl: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
)
_register(
    "pool_logits(Tensor logits, Tensor weights, Tensor group_ptr, str rule, str impl) -> Tensor",
    lambda logits, weights, group_ptr, rule, impl: logits.new_empty(
        group_ptr.shape[0] - 1, logits.shape[1], dtype=torch.float32
    ),
)
