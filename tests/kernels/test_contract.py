"""The contract of the public functions, whatever computes them.

torch's own checks of the seven registered operators; an implementation that is asked for by name is used or refused, never replaced;
and the package stands alone. What is refused, and in which words: `test_refusals.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import whispers_kernels
from tests.kernels.rounding import normal
from whispers_kernels import Plan, available_impls, ops
from whispers_kernels import committee_attention as attention

FP8, INT32, INT64 = torch.float8_e4m3fn, torch.int32, torch.int64


def f32(*shape: int) -> Tensor:
    return normal(*shape, dtype=torch.float32)


def f16(*shape: int) -> Tensor:
    return normal(*shape, dtype=torch.float16)


def fp8(*shape: int) -> Tensor:
    return normal(*shape).to(FP8)


def ints(*values: int, dtype: torch.dtype = INT32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# --- registration ------------------------------------------------------------------------------------------------------------------

PLAN = Plan.from_segments([([3, 1], 5, 0, 0, 2), ([0], 2, 5, 0, 1), ([], 0, 0, 0, 2), ([2], 1, -1, 1, 2)], [6, 5])
EMPTY = Plan.from_segments([], [])


def columns(table: Plan) -> tuple[Tensor, ...]:
    return (table.position, table.page_ptr, table.pages, table.length, table.key_begin, table.row_begin, table.row_end)


POOL, SCALES = (4, 3, 2, 4), (4, 3, 2)
QKV = (f32(3, 4, 4), f32(3, 2, 4), f32(3, 2, 4))
TURN = (f32(3, 2), f32(3, 2), ints(5, -1, 0, dtype=INT64))
OPERATORS: dict[str, list[Callable[[], tuple[Any, ...]]]] = {
    "committee_attention": [
        lambda: (f32(2, 4, 4), f32(*POOL), f32(*POOL), *columns(PLAN), 0.5, None, None, None, None, [], []),
        lambda: (f16(2, 2, 4), f16(*POOL), f16(*POOL), *columns(PLAN), 0.5, 3, 20.0, None, None, [], []),
        lambda: (
            f32(2, 8, 4),
            fp8(*POOL),
            fp8(*POOL),
            *columns(PLAN),
            1.0,
            None,
            None,
            f32(*SCALES),
            f32(*SCALES),
            [],
            [],
        ),
        lambda: (
            f32(4, 2, 4).transpose(0, 1),
            f32(*POOL),
            f32(*POOL),
            *columns(PLAN),
            1.0,
            1,
            None,
            None,
            None,
            [],
            [],
        ),
        lambda: (f32(0, 2, 4), f32(*POOL), f32(*POOL), *columns(EMPTY), 1.0, None, None, None, None, [], []),
    ],
    "embed_rows": [
        lambda: (ints(0, 4, 2, dtype=INT64), f32(5, 3), None),
        lambda: (ints(7, 0, 5, dtype=INT64), f16(5, 3), f32(3, 3)),
        lambda: (ints(dtype=INT64), f32(3, 5).T, f32(5, 3)[:0]),
    ],
    "rms_norm": [
        lambda: (f32(3, 8), f32(8), 1e-5),
        lambda: (f16(2, 3, 16)[..., ::2], f32(8), 1e-5),
        lambda: (f32(8, 3).T, f32(8), 0.5),
    ],
    "add_rms_norm": [
        lambda: (f32(3, 8), f32(8), 1e-5, f32(3, 8)),
        lambda: (f16(2, 3, 16)[..., ::2], f32(8), 1e-5, f16(2, 3, 8)),
        lambda: (f32(8, 3).T, f32(8), 0.5, f32(3, 8)),
    ],
    "rope_and_store": [
        lambda: (*QKV, *TURN, f32(*POOL), f32(*POOL), None, None),
        lambda: (*QKV, *TURN, torch.zeros(POOL).to(FP8), torch.zeros(POOL).to(FP8), f32(*SCALES), f32(*SCALES)),
        lambda: (*f16(3, 6, 4).split((2, 2, 2), dim=1), *TURN, f16(*POOL), f16(*POOL), None, None),
    ],
    "silu_mul": [lambda: (f32(3, 8),), lambda: (f16(3, 12)[:, ::2],), lambda: (f32(0, 8),)],
    "pool_logits": [
        lambda: (f32(3, 5), torch.tensor([0.5, 0.5, 1.0]), ints(0, 2, 3), "mixture"),
        lambda: (f16(3, 5), torch.tensor([0.5, 0.5, 1.0]), ints(0, 2, 3), "product"),
        lambda: (f32(3, 10)[:, ::2], torch.tensor([0.0, 0.5, 0.5]), ints(0, 3), "mixture"),
    ],
}


every_input = pytest.mark.parametrize(
    "name, number", [(name, i) for name in OPERATORS for i in range(len(OPERATORS[name]))]
)


def bits(value: Any) -> Any:
    return value.clone(memory_format=torch.contiguous_format).view(torch.uint8) if isinstance(value, Tensor) else value


@every_input
def test_operators_are_what_they_are_registered_as(name: str, number: int) -> None:
    """The fake's shape, dtype and strides are the result's, and compiled it is the same. torch's schema check cannot compare fp8."""
    args = (*OPERATORS[name][number](), "reference")
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    has_fp8 = any(isinstance(arg, Tensor) and arg.dtype == FP8 for arg in args)
    torch.library.opcheck(getattr(torch.ops.whispers, name).default, args, test_utils=checks[has_fp8:])


@every_input
def test_operators_write_what_their_schema_says_and_nothing_else(name: str, number: int) -> None:
    operator = getattr(torch.ops.whispers, name).default
    args = (*OPERATORS[name][number](), "reference")
    before = [bits(arg) for arg in args]
    operator(*args)
    for argument, arg, old in zip(operator._schema.arguments, args, before, strict=True):
        written = argument.alias_info is not None and argument.alias_info.is_write
        same = torch.equal(bits(arg), old) if isinstance(arg, Tensor) else arg == old
        assert same != (written and arg is not None), argument.name


def test_checks_of_numbers_do_not_stand_in_a_compilers_way() -> None:
    """torch.compile traces without numbers: those that are checked on the CPU are not asked for."""

    def both(table: Tensor, ids: Tensor, group_ptr: Tensor) -> Tensor:
        x = ops.embed_rows(ids, table, impl="reference")
        return ops.pool_logits(x, torch.ones(2), group_ptr, "mixture", impl="reference")

    args = f32(5, 3), ints(4, 0, dtype=INT64), ints(0, 1, 2)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="eager")(*args), both(*args))


def test_every_operator_is_checked_above() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("whispers::")
    }
    assert registered == set(OPERATORS) == set(ops._IMPLS["reference"])


# --- the choice of an implementation ------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[str], Any]] = {
    "committee_attention": lambda impl: attention(f32(2, 4, 4), f32(*POOL), f32(*POOL), PLAN, impl=impl),
    "embed_rows": lambda impl: ops.embed_rows(ints(0, dtype=INT64), f32(5, 3), impl=impl),
    "rms_norm": lambda impl: ops.rms_norm(f32(3, 8), f32(8), 1e-5, impl=impl),
    "add_rms_norm": lambda impl: ops.rms_norm(f32(3, 8), f32(8), 1e-5, f32(3, 8), impl=impl),
    "rope_and_store": lambda impl: ops.rope_and_store(*QKV, *TURN, f32(*POOL), f32(*POOL), impl=impl),
    "silu_mul": lambda impl: ops.silu_mul(f32(3, 8), impl=impl),
    "pool_logits": lambda impl: ops.pool_logits(f32(1, 5), torch.ones(1), ints(0, 1), "product", impl=impl),
}
every_call = pytest.mark.parametrize("name", CALLS)


@every_call
@pytest.mark.parametrize("impl", ["triton", "cpp", "nonsense", ""])
def test_an_implementation_that_is_not_there_is_refused(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_IMPLS", {"reference": ops._IMPLS["reference"]})
    monkeypatch.setattr(ops, "_triton_is_here", lambda: False)
    monkeypatch.setattr(ops, "_cpp", lambda: "not built")
    with pytest.raises(ValueError, match=rf"impl='{impl}' is not available here; accepted: auto, reference"):
        CALLS[name](impl)


@every_call
def test_an_implementation_is_used_by_name_and_never_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("this kernel fails")

    monkeypatch.setattr(ops, "_IMPLS", {"reference": ops._IMPLS["reference"], "triton": {name: fails}})
    monkeypatch.setattr(ops, "_PREFERENCE", {"cpu": ("triton", "reference")})
    monkeypatch.setattr(ops, "_cpp", lambda: "not built")
    assert available_impls() == ("triton", "reference")
    CALLS[name]("reference")
    for impl in ("triton", "auto"):  # the fastest there is
        with pytest.raises(RuntimeError, match="this kernel fails"):
            CALLS[name](impl)


def test_the_package_stands_alone(tmp_path: Path) -> None:
    source = Path(whispers_kernels.__file__).parents[1]
    command = "import sys, whispers_kernels; print(*{name.split('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    loaded = set(done.stdout.split())
    assert {"whispers_kernels", "torch"} <= loaded and loaded.isdisjoint({"whispers_engine", "transformers", "kernels"})
