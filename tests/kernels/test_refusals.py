"""Every refusal in `ops` and `plan` is provoked, and its message names the argument, what was found and what is accepted.

Each line of the table changes arguments of a call that is fine otherwise. The last test reads the sources: no check is left out.
"""

from __future__ import annotations

import ast
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.rounding import normal
from whispers_kernels import Plan, ops, plan

FP8, INT32, INT64 = torch.float8_e4m3fn, torch.int32, torch.int64
SEGMENTS = [([3, 1], 5, 0, 0, 2), ([0], 2, 5, 0, 1)]


def f32(*shape: int) -> Tensor:
    return normal(*shape, dtype=torch.float32)


def f16(*shape: int) -> Tensor:
    return normal(*shape, dtype=torch.float16)


def fp8(*shape: int) -> Tensor:
    return normal(*shape).to(FP8)


def whole(*shape: int, dtype: torch.dtype = INT64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def pools(pool: Tensor) -> dict[str, Tensor]:
    return {"k_pages": pool, "v_pages": pool.clone()}


def scales(k_scale: Tensor | None, v_scale: Tensor | None) -> dict[str, Any]:
    return {**pools(fp8(4, 3, 2, 4)), "k_scale": k_scale, "v_scale": v_scale}


FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "attention": (
        ops.committee_attention,
        {"q": f32(2, 4, 4), **pools(f32(4, 3, 2, 4)), "plan": Plan.from_segments(SEGMENTS, [6, 5])},
    ),
    "embed": (ops.embed_rows, {"ids": whole(2), "table": f32(5, 3), "soft": f32(2, 3)}),
    "norm": (ops.rms_norm, {"x": f32(2, 3), "weight": f32(3), "eps": 1e-5, "residual": f32(2, 3)}),
    "rope": (
        ops.rope_and_store,
        {"q": f32(3, 4, 4), "k": f32(3, 2, 4), "v": f32(3, 2, 4), "cos": f32(3, 2), "sin": f32(3, 2)}
        | {"slots": torch.tensor([5, -1, 0]), **pools(f32(4, 3, 2, 4))},
    ),
    "silu": (ops.silu_mul, {"gate_up": f32(3, 8)}),
    "pool": (
        ops.pool_logits,
        {
            "logits": f32(3, 5),
            "weights": torch.ones(3),
            "group_ptr": torch.tensor([0, 3], dtype=INT32),
            "rule": "mixture",
        },
    ),
    "plan": (Plan.from_segments, {"segments": SEGMENTS, "positions": [6, 5]}),
}

FLOATS = "accepted: torch.float32, torch.bfloat16, torch.float16, torch.float64"
PAGES = "[pages, page_size, kv_heads, head_dim]"
POOL, SCALE = (4, 3, 2, 4), (4, 3, 2)
FAR = 2**30
TABLE: list[tuple[str, dict[str, Any], tuple[str, str, str]]] = [
    ("attention", {"q": f32(2, 4)}, ("q:", "[2, 4] float32", "accepted: [rows, q_heads, head_dim]")),
    ("attention", {"q": whole(2, 4, 4)}, ("q:", "torch.int64", FLOATS)),
    ("attention", {"q": fp8(2, 4, 4)}, ("q:", "torch.float8_e4m3fn", FLOATS)),
    ("attention", {"q": f32(2, 0, 4)}, ("q:", "[2, 0, 4] float32", "heads not 0")),
    ("attention", {"q": f32(2, 4, 0), **pools(f32(4, 3, 2, 0))}, ("q:", "[2, 4, 0] float32", "heads not 0")),
    ("attention", {"k_pages": f32(*SCALE)}, ("k_pages:", "[4, 3, 2] float32", f"accepted: {PAGES}")),
    ("attention", {"v_pages": f32(*SCALE)}, ("v_pages", "[4, 3, 2] float32", PAGES)),
    ("attention", {"v_pages": f32(4, 3, 2, 5)}, ("v_pages", "[4, 3, 2, 5] float32", PAGES)),
    ("attention", {"v_pages": f16(*POOL)}, ("v_pages", "[4, 3, 2, 4] float16", PAGES)),
    ("attention", {"q": f32(2, 4, 8)}, ("k_pages", "[4, 3, 2, 4] float32", "2 kv_heads of head_dim 8")),
    ("attention", pools(whole(*POOL)), ("k_pages:", "torch.int64", FLOATS)),
    ("attention", {"q": f32(2, 3, 4)}, ("q:", "3 q_heads", "multiple of 2 kv_heads")),
    ("attention", pools(f32(4, 3, 0, 4)), ("q:", "4 q_heads", "multiple of 0 kv_heads")),
    ("attention", scales(None, f32(*SCALE)), ("k_scale:", "none", "fp8 pages need float32 [4, 3, 2]")),
    ("attention", scales(f32(*SCALE), None), ("v_scale:", "none", "fp8 pages need float32 [4, 3, 2]")),
    ("attention", scales(f32(4, 3, 1), f32(*SCALE)), ("k_scale:", "[4, 3, 1] float32", "float32 [4, 3, 2]")),
    ("attention", scales(f32(*SCALE), f32(4, 2)), ("v_scale:", "[4, 2] float32", "float32 [4, 3, 2]")),
    ("attention", scales(f32(*SCALE), f16(*SCALE)), ("v_scale:", "[4, 3, 2] float16", "float32 [4, 3, 2]")),
    ("attention", {"k_scale": f32(*SCALE)}, ("k_scale", "torch.float32", "for fp8 pages")),
    ("attention", {"v_scale": f32(*SCALE)}, ("v_scale", "torch.float32", "for fp8 pages")),
    ("attention", {"q": f32(3, 4, 4)}, ("plan:", "2 rows", "a q of 3")),
    ("attention", {"q": f32(1, 4, 4)}, ("plan:", "2 rows", "a q of 1")),
    ("attention", pools(f32(3, 3, 2, 4)), ("plan:", "page 3", "has 3 pages")),
    ("attention", pools(f32(4, 2, 2, 4)), ("plan:", "pages of 2 keys", "needs pages of 3")),
    ("attention", {"plan": Plan.from_segments(SEGMENTS, [6, 5], "meta")}, ("plan:", "on meta", "q's device, cpu")),
    ("attention", {"window": 0}, ("window:", "0", "accepted: None or at least 1")),
    ("attention", {"window": -3}, ("window:", "-3", "accepted: None or at least 1")),
    ("attention", {"softcap": 0.0}, ("softcap:", "0.0", "accepted: None or above 0")),
    ("attention", {"softcap": -1.5}, ("softcap:", "-1.5", "accepted: None or above 0")),
    ("attention", {"softcap": math.nan}, ("softcap:", "nan", "accepted: None or above 0")),
    ("attention", {"impl": "nonsense"}, ("impl", "'nonsense'", "accepted: auto, ")),
    ("embed", {"ids": whole(2, 1)}, ("ids:", "[2, 1] int64", "accepted: int64 [rows]")),
    ("embed", {"ids": whole(2, dtype=INT32)}, ("ids:", "[2] int32", "accepted: int64 [rows]")),
    ("embed", {"table": f32(5)}, ("table:", "[5] float32", "accepted: [vocabulary, hidden]")),
    ("embed", {"table": whole(5, 3)}, ("table:", "torch.int64", FLOATS)),
    ("embed", {"soft": f32(3)}, ("soft:", "[3] float32", "accepted: [virtual tokens, 3]")),
    ("embed", {"soft": f32(2, 4)}, ("soft:", "[2, 4] float32", "accepted: [virtual tokens, 3]")),
    ("embed", {"soft": fp8(2, 3)}, ("soft:", "torch.float8_e4m3fn", FLOATS)),
    ("embed", {"soft": whole(2, 3)}, ("soft:", "torch.int64", FLOATS)),
    ("embed", {"ids": torch.tensor([2, -1])}, ("ids:", "-1 to 2", "accepted: 0 to 6")),
    ("embed", {"ids": torch.tensor([7, 0])}, ("ids:", "0 to 7", "accepted: 0 to 6")),
    ("embed", {"ids": torch.tensor([5, 4]), "soft": None}, ("ids:", "4 to 5", "accepted: 0 to 4")),
    ("norm", {"x": whole(2, 3)}, ("x:", "torch.int64", FLOATS)),
    ("norm", {"weight": fp8(3)}, ("weight:", "torch.float8_e4m3fn", FLOATS)),
    ("norm", {"weight": fp8(3), "residual": None}, ("weight:", "torch.float8_e4m3fn", FLOATS)),
    ("norm", {"weight": whole(3)}, ("weight:", "torch.int64", FLOATS)),
    ("norm", {"weight": f32(2)}, ("weight:", "[2] float32", "accepted: [3]")),
    ("norm", {"weight": f32(1, 3)}, ("weight:", "[1, 3] float32", "accepted: [3]")),
    ("norm", {"residual": f32(3)}, ("residual:", "[3] float32", "accepted: [2, 3] float32")),
    ("norm", {"residual": f16(2, 3)}, ("residual:", "[2, 3] float16", "accepted: [2, 3] float32")),
    ("rope", {"q": f32(3, 4)}, ("q:", "[3, 4] float32", "accepted: [rows, q_heads, an even head_dim]")),
    ("rope", {"q": f32(3, 4, 3)}, ("q:", "[3, 4, 3] float32", "accepted: [rows, q_heads, an even head_dim]")),
    ("rope", {"q": f32(3, 0, 4)}, ("q:", "[3, 0, 4] float32", "heads not 0")),
    ("rope", {"q": f32(3, 4, 0)}, ("q:", "[3, 4, 0] float32", "heads not 0")),
    ("rope", {"k": f32(3, 0, 4), "v": f32(3, 0, 4)}, ("k ", "[3, 0, 4] float32", "[3, kv_heads, 4]")),
    ("rope", {"q": whole(3, 4, 4)}, ("q:", "torch.int64", FLOATS)),
    ("rope", {"k": f32(3, 4), "v": f32(3, 4)}, ("k ", "[3, 4] float32", "[3, kv_heads, 4] in q's dtype")),
    ("rope", {"k": f32(2, 2, 4), "v": f32(2, 2, 4)}, ("k ", "[2, 2, 4] float32", "[3, kv_heads, 4] in q's dtype")),
    ("rope", {"k": f32(3, 2, 6), "v": f32(3, 2, 6)}, ("k ", "[3, 2, 6] float32", "[3, kv_heads, 4] in q's dtype")),
    ("rope", {"k": f16(3, 2, 4)}, ("k ", "[3, 2, 4] float16", "[3, kv_heads, 4] in q's dtype")),
    ("rope", {"v": f32(3, 1, 4)}, ("v ", "[3, 1, 4] float32", "[3, kv_heads, 4] in q's dtype")),
    ("rope", {"v": f16(3, 2, 4)}, ("v ", "[3, 2, 4] float16", "[3, kv_heads, 4] in q's dtype")),
    ("rope", {"cos": f32(3, 4)}, ("cos ", "[3, 4] float32", "accepted: [3, 2]")),
    ("rope", {"sin": f32(2, 2)}, ("sin ", "[2, 2] float32", "accepted: [3, 2]")),
    ("rope", {"cos": fp8(3, 2)}, ("cos:", "torch.float8_e4m3fn", FLOATS)),
    ("rope", {"sin": whole(3, 2)}, ("sin:", "torch.int64", FLOATS)),
    ("rope", {"slots": torch.tensor([5, 12, 0])}, ("slots:", "0 to 12", "accepted: -1 to 11")),
    ("rope", {"slots": torch.tensor([5, -2, 0])}, ("slots:", "-2 to 5", "accepted: -1 to 11")),
    ("rope", {"slots": whole(2)}, ("slots:", "[2] int64", "accepted: int64 [3]")),
    ("rope", {"slots": whole(3, dtype=INT32)}, ("slots:", "[3] int32", "accepted: int64 [3]")),
    ("rope", pools(f32(4, 3, 4)), ("k_pages", "[4, 3, 4] float32", PAGES)),
    ("rope", pools(f32(4, 3, 3, 4)), ("k_pages", "[4, 3, 3, 4] float32", "2 kv_heads of head_dim 4")),
    ("rope", pools(fp8(*POOL)), ("k_scale:", "none", "fp8 pages need float32 [4, 3, 2]")),
    ("rope", {"v_scale": f32(*SCALE)}, ("v_scale", "torch.float32", "for fp8 pages")),
    ("silu", {"gate_up": f32(8)}, ("gate_up:", "[8] float32", "accepted: [rows, 2 * I]")),
    ("silu", {"gate_up": f32(3, 7)}, ("gate_up:", "[3, 7] float32", "accepted: [rows, 2 * I]")),
    ("silu", {"gate_up": whole(3, 8)}, ("gate_up:", "torch.int64", FLOATS)),
    ("pool", {"logits": f32(5)}, ("logits:", "[5] float32", "accepted: [rows, vocabulary]")),
    ("pool", {"logits": whole(3, 5)}, ("logits:", "torch.int64", FLOATS)),
    ("pool", {"weights": f32(2)}, ("weights:", "[2] float32", "accepted: float32 [3]")),
    ("pool", {"weights": f16(3)}, ("weights:", "[3] float16", "accepted: float32 [3]")),
    ("pool", {"group_ptr": whole(2)}, ("group_ptr:", "[2] int64", "accepted: int32 [groups + 1]")),
    ("pool", {"group_ptr": whole(0, dtype=INT32)}, ("group_ptr:", "[0] int32", "accepted: int32 [groups + 1]")),
    ("pool", {"group_ptr": whole(1, 2, dtype=INT32)}, ("group_ptr:", "[1, 2] int32", "accepted: int32 [groups + 1]")),
    ("pool", {"group_ptr": torch.tensor([0, 4]).int()}, ("group_ptr:", "[0, 4]", "accepted: ascending from 0 to 3")),
    ("pool", {"group_ptr": torch.tensor([-2, 3]).int()}, ("group_ptr:", "[-2, 3]", "accepted: ascending from 0 to 3")),
    ("pool", {"group_ptr": torch.tensor([3, 1]).int()}, ("group_ptr:", "[3, 1]", "accepted: ascending from 0 to 3")),
    ("pool", {"rule": "mean"}, ("rule:", "'mean'", "accepted: mixture, product")),
    ("plan", {"segments": [([0], -1, 0, 0, 2)]}, ("segment 0:", "length -1", "1 pages")),
    ("plan", {"segments": [*SEGMENTS, ([], 5, 0, 0, 2)]}, ("segment 2:", "length 5", "0 pages")),
    ("plan", {"segments": [([0], 1, 0, -1, 2)]}, ("segment 0:", "rows [-1, 2)", "[0, 2)")),
    ("plan", {"segments": [([0], 1, 0, 2, 1)]}, ("segment 0:", "rows [2, 1)", "[0, 2)")),
    ("plan", {"segments": [*SEGMENTS, ([0], 1, 0, 0, 3)]}, ("segment 2:", "rows [0, 3)", "[0, 2)")),
    ("plan", {"segments": [([4, -2], 1, 0, 0, 2)]}, ("segment 0:", "page -2", "negative")),
    ("plan", {"segments": [*SEGMENTS, ([0], 2, FAR - 1, 0, 2)]}, ("segment 2:", f"[{FAR - 1}, {FAR + 1})", f"{FAR})")),
    ("plan", {"segments": [([0], 2, -FAR - 1, 0, 2)]}, ("segment 0:", f"[{-FAR - 1}, ", f"accepted: within [{-FAR}, ")),
    ("plan", {"segments": [([0], 2, 2**40, 0, 2)]}, ("segment 0:", f"[{2**40}, ", f"accepted: within [{-FAR}, ")),
    ("plan", {"positions": [6, FAR + 1]}, ("positions:", f"6 to {FAR + 1}", f"accepted: {-FAR} to {FAR}")),
    ("plan", {"positions": [-FAR - 1, 5]}, ("positions:", f"{-FAR - 1} to 5", f"accepted: {-FAR} to {FAR}")),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_unchanged_calls_are_accepted(name: str) -> None:
    function, arguments = FUNCTIONS[name]
    function(**arguments)


def test_the_farthest_that_are_accepted() -> None:
    """The last id, slot, group and position."""
    for name, changed in (
        ("embed", {"ids": torch.tensor([0, 6])}),
        ("rope", {"slots": torch.tensor([11, -1, 0])}),
        ("pool", {"group_ptr": torch.tensor([1, 1, 3, 3]).int()}),
        ("plan", {"segments": [([0], 2, FAR - 2, 0, 2), ([0], 2, -FAR, 0, 1)], "positions": [FAR, -FAR]}),
    ):
        function, arguments = FUNCTIONS[name]
        function(**{**arguments, **changed})


@pytest.mark.parametrize("name, changed, words", TABLE)
def test_a_refusal_says_what_was_found_and_what_is_accepted(
    name: str, changed: dict[str, Any], words: tuple[str, ...]
) -> None:
    function, arguments = FUNCTIONS[name]
    with pytest.raises(ValueError) as refusal:
        function(**{**arguments, **changed})
    assert [word for word in words if word not in str(refusal.value)] == [], str(refusal.value)


def refusals(path: str) -> list[ast.expr | ast.stmt]:
    """Every call of `_require` in a module, and every `raise` but `_require`'s own."""
    found: list[ast.expr | ast.stmt] = []
    for node in ast.walk(ast.parse(Path(path).read_text())):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_require"
        raised = isinstance(node, ast.Raise) and ast.unparse(node) != "raise ValueError(message)"
        if isinstance(node, ast.Call | ast.Raise) and (called or raised):
            found.append(node)
    return found


def test_the_table_reaches_every_check() -> None:
    reached: set[tuple[str, int | None]] = set()
    for name, changed, _ in TABLE:
        function, arguments = FUNCTIONS[name]
        with pytest.raises(ValueError) as refusal:
            function(**{**arguments, **changed})
        reached |= {(frame.filename, frame.lineno) for frame in traceback.extract_tb(refusal.value.__traceback__)}
    for path in map(str, (ops.__file__, plan.__file__)):
        found = refusals(path)
        assert len(found) >= 3
        lines = {node: range(node.lineno, (node.end_lineno or node.lineno) + 1) for node in found}
        missed = [node for node in found if not any((path, line) in reached for line in lines[node])]
        assert [ast.unparse(node) for node in missed] == []
