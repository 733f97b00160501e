"""`whispers verify` is green for the definition and red for every fault planted in a copy of it, in each dtype that can tell."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from whispers_engine.cli import common
from whispers_engine.cli.main import app
from whispers_kernels import ops, reference, verify, verify_checks
from whispers_kernels.verify import Check, Result
from whispers_kernels.verify_cases import COMMON, FP8, Case, attention_cases, decode
from whispers_kernels.verify_checks import Part, Run, new_memory_is_nan

CPU = torch.device("cpu")
OPERATIONS = (
    "committee_attention",
    "embed_rows",
    "rms_norm",
    "add_rms_norm",
    "rope_and_store",
    "silu_mul",
    "pool_logits",
)
every_operation = pytest.mark.parametrize("op", OPERATIONS)

Kernel = Callable[..., Any]
Plant = Callable[[str, Kernel], None]


def results(op: str, dtype: str = "", case: str = "", impl: str = "planted") -> list[Result]:
    """Those of an operation in dtypes and cases that hold these texts. Cases of attention are few here: the rest is like them."""
    if op == "committee_attention" and not case:
        case = "GQA 3"
    chosen = [c for c in verify.checks(impl, CPU) if c.op == op and dtype in c.dtype and case in c.case]
    assert chosen
    return [result for check in chosen for result in check.run()]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Makes `impl="planted"` of the definition, but for one operation."""

    def plant(op: str, kernel: Kernel, impl: str = "planted") -> None:
        monkeypatch.setitem(ops._IMPLS, impl, {**reference.IMPLS, op: kernel})

    return plant


def altered(op: str, change: Callable[[Tensor], Tensor]) -> Kernel:
    """The definition, its result changed: the first, where there are two."""

    def kernel(*args: Any) -> Any:
        found = reference.IMPLS[op](*args)
        return (change(found[0]), *found[1:]) if isinstance(found, tuple) else change(found)

    return kernel


def with_one_nan(result: Tensor) -> Tensor:
    result.view(-1)[-1:] = math.nan
    return result


def but_for_one_entry(result: Tensor) -> Tensor:
    """As a kernel leaves its result when it forgets to write the last entry."""
    written = torch.empty_like(result)
    written.view(-1)[:-1] = result.contiguous().view(-1)[:-1]
    return written


def test_the_definition_is_green() -> None:
    long = "over 3000 keys"  # the slowest, and no other in 16 bits
    chosen = [c for c in verify.checks("reference", CPU) if long not in c.case or c.dtype == "float32"]
    found = [result for check in chosen for result in check.run()]
    assert [result for result in found if not result.ok] == []
    assert all(0 <= result.error <= result.budget < math.inf and result.note == "" for result in found)
    floats = ("float32", "bfloat16", "float16")
    assert {(result.op, result.dtype) for result in found} == {
        *((op, dtype) for op in OPERATIONS for dtype in floats),
        *((op, f"{dtype} fp8") for op in ("committee_attention", "rope_and_store") for dtype in floats),
    }


def test_every_size_that_a_kernel_is_compiled_for_occurs() -> None:
    settings = [case.setting for case in attention_cases(small=False, far=True) if not case.fp8]
    assert {setting.group for setting in settings} == {1, 2, 3, 4, 8, 16}
    assert {setting.dim for setting in settings} == {64, 80, 96, 128, 256}
    assert {setting.page_size for setting in settings} == {7, 16, 64, 128}
    assert {case.setting for case in attention_cases(small=True, far=False)} != set(settings)
    for option in ("window", "softcap", "scale"):
        assert {getattr(setting, option) is None for setting in settings} == {True, False}


@every_operation
def test_off_by_one_percent_is_red(op: str, plant: Plant) -> None:
    plant(op, altered(op, lambda result: result * 1.01))
    green = [result.case for result in results(op, "float32") if result.ok]
    # Nothing, and the logarithm of a certainty, are the same as a hundredth more of them.
    assert all(case.startswith("0 rows") or case.endswith("vocabulary 1") for case in green), green


@every_operation
@pytest.mark.parametrize("fault", [with_one_nan, but_for_one_entry])
def test_an_entry_that_is_nan_or_not_written_is_red_in_every_dtype(
    op: str, fault: Callable[[Tensor], Tensor], plant: Plant
) -> None:
    plant(op, altered(op, fault))
    for result in results(op):
        assert result.case.startswith("0 rows") or (not result.ok and "1 of " in result.note), result


@every_operation
def test_a_kernel_that_raises_is_red_with_its_first_line(op: str, plant: Plant) -> None:
    def kernel(*args: Any) -> Any:
        raise RuntimeError("out of registers\nand much more")

    plant(op, kernel)
    for result in results(op):
        assert not result.ok and result.note == "RuntimeError: out of registers"
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["error"] is None


def test_a_result_of_another_shape_is_red(plant: Plant) -> None:
    plant("silu_mul", altered("silu_mul", lambda result: result[:1, :1]))
    notes = [result.note for result in results("silu_mul", "float32", "[5, ")]
    assert notes == ["the shape is [1, 1], not [5, 129]"]


def attention_with(**changed: Callable[[dict[str, Any]], Any]) -> Kernel:
    """The definition with other arguments, made from all of them by name."""
    code = reference.committee_attention.__code__
    names = code.co_varnames[: code.co_argcount]

    def kernel(*args: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        return reference.committee_attention(**{**given, **{name: make(given) for name, make in changed.items()}})

    return kernel


def whole_pages(given: dict[str, Any]) -> Tensor:
    page_size = given["k_pages"].shape[1]
    return -(-given["length"] // page_size) * page_size


FAULTS: dict[str, Kernel] = {
    "reads to the end of a page": attention_with(length=whole_pages, position=lambda a: a["position"] + 9),
    "keys one position on": attention_with(key_begin=lambda a: a["key_begin"] + 1),
    "forgets a row": attention_with(row_begin=lambda a: torch.minimum(a["row_begin"] + 1, a["row_end"])),
    "a scale of its own": attention_with(scale=lambda a: a["scale"] * 1.05),
    "no window": attention_with(window=lambda a: None),
    "no softcap": attention_with(softcap=lambda a: None),
    "keys for values": attention_with(v_pages=lambda a: a["k_pages"]),
    "pages in another order": attention_with(pages=lambda a: a["pages"].flip(0)),
    "one segment less": attention_with(
        length=lambda a: torch.where(a["length"] == a["length"].max(), 0, a["length"]),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_an_attention_is_red_in_every_dtype(fault: str, plant: Plant) -> None:
    plant("committee_attention", FAULTS[fault])
    found = results("committee_attention")
    assert {result.dtype for result in found if not result.ok} == {
        f"{dtype}{pages}" for dtype in ("float32", "bfloat16", "float16") for pages in ("", " fp8")
    }


@pytest.mark.parametrize("length", [100, 700, 3000])
def test_one_key_of_many_missed_shows_in_float32(length: int, plant: Plant) -> None:
    plant(
        "committee_attention", attention_with(length=lambda a: a["length"] - (a["length"] == a["length"].max()).int())
    )
    assert not results("committee_attention", "float32", f"over {length} keys")[0].ok


def test_a_slot_written_that_is_no_rows_is_red(plant: Plant) -> None:
    def kernel(*args: Any) -> Tensor:
        out = reference.rope_and_store(*args)
        slots, k_pages, v_pages = args[5:8]
        free = next(slot for slot in range(k_pages.shape[0] * k_pages.shape[1]) if slot not in slots.tolist())
        v_pages.view(-1, *v_pages.shape[2:])[free, 0, -1] = 1.0
        return out

    plant("rope_and_store", kernel)
    assert all(not result.ok and "v_pages: slot" in result.note for result in results("rope_and_store"))


@pytest.mark.parametrize("index", [6, 7], ids=["k_pages", "v_pages"])
def test_a_slot_not_written_is_red(index: int, plant: Plant) -> None:
    def kernel(*args: Any) -> Tensor:
        pool = args[index]
        before = pool.clone()
        out = reference.rope_and_store(*args)
        pool.view(-1, *pool.shape[2:])[args[5][0]] = before.view(-1, *pool.shape[2:])[args[5][0]]
        return out

    plant("rope_and_store", kernel)
    assert all(not result.ok and "NaN" in result.note for result in results("rope_and_store"))


def test_a_row_whose_bits_depend_on_its_neighbours_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the budget of the first line; the second is there for this."""
    kernel = altered("committee_attention", lambda result: result * (1 + 5e-9 * result.shape[0]))
    monkeypatch.setitem(ops._IMPLS, "triton", {**reference.IMPLS, "committee_attention": kernel})
    check = next(c for c in verify.checks("triton", CPU) if "prefill;" in c.case and c.dtype == "float32")
    accuracy, alone = check.run()
    assert accuracy.ok and not alone.ok
    assert alone.case == f"{accuracy.case}: rows alone" and 0 == alone.budget < alone.error < accuracy.budget


def test_what_an_interpreter_cannot_tell_is_left_out_and_said() -> None:
    said = " ".join(verify.left_out("triton", CPU))
    if importlib.util.find_spec("triton") is not None and ops._load("triton"):
        found = {(check.op, check.dtype) for check in verify.checks("triton", CPU)}
        assert not any("bfloat16" in dtype for _, dtype in found) and ("rope_and_store", "float32 fp8") not in found
        assert ("committee_attention", "float16 fp8") in found
    assert "bfloat16" in said and "rope_and_store into fp8 pages" in said
    assert verify.left_out("reference", CPU) == []


def test_far_pages_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    """With fewer pages in front than a device has: a kernel that lost the upper bits of an address would read NaN."""
    monkeypatch.setattr(verify_checks, "ENTRIES_OF_32_BITS", 2**20)
    case = Case(COMMON, decode(COMMON.page_size, 3, 100), fp8=True, far=True)
    before = 2**20 // (COMMON.page_size * COMMON.kv_heads * COMMON.dim)

    def run() -> list[Result]:
        compare = lambda: verify_checks.attention(Run("planted", CPU, torch.float32), case)  # noqa: E731
        return list(Check("committee_attention", "planted", "float32 fp8", str(case), compare).run())

    plant("committee_attention", reference.committee_attention)
    assert all(result.ok and "2^31" in result.case for result in run())
    plant("committee_attention", attention_with(pages=lambda a: a["pages"] % before))
    assert not any(result.ok for result in run())


def test_new_memory_is_nan_and_then_is_not() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.raises(KeyError), new_memory_is_nan():
        assert torch.empty(1000).isnan().all() and torch.empty_like(torch.zeros(9).to(FP8)).float().isnan().all()
        raise KeyError
    after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert after == before


def test_the_entry_nearest_to_its_budget_is_the_one_shown() -> None:
    exact, budget = torch.zeros(3, dtype=torch.float64), torch.tensor([10.0, 0.1, 1.0])
    assert verify.judge([Part(torch.tensor([5.0, 0.0, 0.9]), exact, budget)]) == pytest.approx((0.9, 1.0, ""))
    assert verify.judge([Part(torch.tensor([5.0, 0.2, 0.9]), exact, budget)]) == pytest.approx((0.2, 0.1, ""))
    assert verify.judge([Part(exact, exact, 0.0)]) == (0.0, 0.0, "")
    assert (
        verify.judge([Part(torch.tensor([math.inf, 0, 0]), exact, math.inf)])[2] == "1 of 3 entries are NaN or infinite"
    )
    hidden = torch.full((3,), -math.inf)
    assert verify.judge([Part(hidden, hidden, 0.0)])[2] == ""
    assert verify.judge([Part(exact.float(), hidden, 0.0)])[0] == math.inf


# --- the command -------------------------------------------------------------------------------------------------------------------


def whispers(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", "--device", "cpu", *args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def test_the_command_is_green(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.out, "width", 200)
    status, printed = whispers("--impl", "reference", "--only", "silu_mul")
    assert status == 0 and "all 9 green" in printed and printed.count("[37, 2 * 4864]") == 3


def test_json_of_a_red_command(plant: Plant) -> None:
    plant("silu_mul", altered("silu_mul", with_one_nan))
    status, printed = whispers("--impl", "planted", "--only", "silu_mul, float32", "--json")
    found = json.loads(printed, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert status == 1 and found["ok"] is False and found["device"].startswith("cpu: ")
    assert found["versions"]["torch"] == torch.__version__
    keys = {"op", "impl", "dtype", "case", "error", "budget", "ok", "note"}
    assert len(found["results"]) == 3 and all(set(result) == keys and not result["ok"] for result in found["results"])


def test_a_red_table_ends_with_status_1(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plant("rms_norm", altered("rms_norm", lambda result: result * 1.01))
    status, printed = whispers("--impl", "planted", "--only", "float32, [5")
    assert status == 1 and "1 of 3 red" in printed and "green" in printed


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs triton, and no GPU"
)
def test_triton_without_a_gpu_is_interpreted_by_the_command_itself() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "whispers_engine.cli.main",
        "verify",
        "--impl",
        "triton",
        "--device",
        "cpu",
        "--json",
    ]
    ran = subprocess.run([*command, "--only", "silu_mul, float16"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["ok"] and {result["impl"] for result in found["results"]} == {"triton"}
    assert any("bfloat16" in line for line in found["left_out"])
