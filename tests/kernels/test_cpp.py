"""The C++ kernels beside their results: instruction sets, threads, what is refused, and that they are optional.

That every instruction set of this machine computes what the tests of the operations want: those tests, in a process for each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.kernels.rounding import normal
from whispers_kernels import Plan, available_impls, committee_attention, ops, rms_norm, rope_and_store, silu_mul

pytestmark = pytest.mark.skipif("cpp" not in available_impls(), reason="needs the C++ kernels")
ROOT = Path(__file__).parents[2]
PARITY = ("test_committee_attention.py", "test_likeliest.py", "test_other_ops.py", "test_rope_and_store.py")
FP8 = torch.float8_e4m3fn


def python(*args: str, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WHISPERS_ISA", "PYTEST"))}
    environment |= {} if isa is None else {"WHISPERS_ISA": isa}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True)


def isas() -> tuple[str, ...]:
    if "cpp" not in available_impls():
        return ()
    from whispers_kernels import cpp

    return cpp.isas()


@pytest.mark.parametrize("isa", isas()[1:])  # the best is what all other tests run
def test_parity_with_another_instruction_set(isa: str) -> None:
    tests = [str(Path(__file__).with_name(name)) for name in PARITY]
    done = python("-m", "pytest", "-n0", "-k", "cpp", *tests, isa=isa)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 200


@pytest.mark.parametrize("isa", isas()[1:])
def test_a_whole_forward_with_another_instruction_set(isa: str) -> None:
    """Against transformers and PEFT, and pages in panels against plain ones."""
    tests = [str(ROOT / "tests" / "engine" / name) for name in ("test_equivalence.py", "test_panels.py")]
    done = python("-m", "pytest", "-n0", "-k", "llama", *tests, isa=isa)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 20


@pytest.mark.parametrize("isa", isas())
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    done = python("-c", "from whispers_kernels import cpp; print(cpp.isa())", isa=isa)
    assert done.stdout.split() == [isa]


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    done = python("-c", "from whispers_kernels import ops; ops.check_impl('auto')", isa="sse9")
    assert done.returncode != 0
    assert f"ValueError: WHISPERS_ISA='sse9' is not available here; accepted: {', '.join(isas())}" in done.stderr


def test_auto_takes_them_on_a_cpu() -> None:
    assert ops.check_impl("auto", "cpu") == "cpp"


def test_without_the_extension_the_definition_runs_and_a_named_impl_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    without = (
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'whispers_kernels._C' else find(name, *more)\n"
        "from whispers_kernels import ops; print(ops.check_impl('auto'), ops.available_impls())\n"
        "ops.check_impl('cpp')"
    )
    done = python("-c", without)
    assert done.stdout.startswith("reference (") and "cpp" not in done.stdout
    assert "impl='cpp' is not available here" in done.stderr and "whispers_kernels._C was not built" in done.stderr


@pytest.fixture
def threads() -> object:
    """Whatever a test sets is undone."""
    from whispers_kernels import cpp

    before = cpp.num_threads()
    yield
    cpp.set_num_threads(before)


def prefill(rows: int) -> tuple[Plan, torch.Tensor, torch.Tensor]:
    plan = Plan.from_segments([(list(range(rows // 16)), rows, 0, 0, rows)], list(range(rows)))
    return plan, normal(rows, 4, 32, dtype=torch.bfloat16), normal(rows // 16, 16, 2, 32, dtype=torch.bfloat16, seed=1)


def test_the_number_of_threads_changes_no_bits(threads: object) -> None:
    from whispers_kernels import cpp

    plan, q, pages = prefill(320)
    x, weight = normal(300, 257, dtype=torch.float32), normal(257, dtype=torch.float32)
    results = []
    for number in (1, 2, 3, 7, 1):
        cpp.set_num_threads(number)
        assert cpp.num_threads() == number
        results.append((committee_attention(q, pages, pages, plan, impl="cpp"), rms_norm(x, weight, 1e-6, impl="cpp")))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("number", (0, -1, 4097, 2**31, 2**32 + 3))  # the last is 3 in 32 bits
def test_no_number_of_threads(number: int) -> None:
    from whispers_kernels import cpp

    before = cpp.num_threads()
    with pytest.raises(ValueError, match=f"threads: {number}; accepted: 1 to 4096"):
        cpp.set_num_threads(number)
    assert cpp.num_threads() == before


def test_threads_that_the_system_does_not_start_are_done_without() -> None:
    """There is address space for the stacks of some of them."""
    done = python(
        "-c",
        "import resource, torch; from whispers_kernels import cpp, silu_mul\n"
        "x = torch.randn(64, 1024); expected = silu_mul(x, impl='cpp')\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))\n"
        "cpp.set_num_threads(1000); found = cpp.num_threads()\n"
        "same = torch.equal(silu_mul(x, impl='cpp'), expected); cpp.set_num_threads(2)\n"
        "print(1 < found < 1000, same, cpp.num_threads(), torch.equal(silu_mul(x, impl='cpp'), expected))",
    )
    assert done.stdout.split() == ["True", "True", "2", "True"], done.stderr


def test_nothing_is_read_of_what_the_call_before_left() -> None:
    """In the second 256 of these 512 keys one row has summed some already, and the other none."""
    plan = Plan.from_segments([(list(range(32)), 512, 2048, 0, 2)], [2500, 2330])
    q, keys, values = (normal(*shape, dtype=torch.bfloat16) for shape in ((2, 4, 32), (32, 16, 2, 32), (32, 16, 2, 32)))

    def attend(values: torch.Tensor) -> torch.Tensor:
        return committee_attention(q, keys, values, plan, window=100, impl="cpp")

    expected = attend(values)
    assert attend(torch.full_like(values, torch.nan)).isnan().all()
    assert torch.equal(attend(values), expected) and expected.isfinite().all()


def test_several_python_threads_may_call_at_once() -> None:
    plan, q, pages = prefill(160)
    expected = committee_attention(q, pages, pages, plan, impl="cpp")
    with ThreadPoolExecutor(4) as callers:
        calls = [callers.submit(committee_attention, q, pages, pages, plan, impl="cpp") for _ in range(60)]
        assert all(torch.equal(call.result(), expected) for call in calls)


def test_a_forked_process_has_threads_of_its_own() -> None:
    x = normal(64, 1024, dtype=torch.float32)
    expected = silu_mul(x, impl="cpp")
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(silu_mul(x, impl="cpp"), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_process_has_as_many_threads(threads: object) -> None:
    from whispers_kernels import cpp

    x = normal(64, 1024, dtype=torch.float32)
    for number in (1, 5):
        cpp.set_num_threads(number)
        child = os.fork()
        if child == 0:
            silu_mul(x, impl="cpp")
            os._exit(cpp.num_threads())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == number


def test_fp8_is_for_pages_alone() -> None:
    """Whoever passes `ops` by: weights of fp8 would be read as float16, beyond their end."""
    from whispers_kernels import cpp
    from whispers_kernels.cpp.likeliest import likeliest

    x, eighths = normal(2, 16, dtype=torch.float32), normal(2, 16).to(FP8)
    for call in (
        lambda: cpp.IMPLS["rms_norm"](x, eighths[0], 1e-6),
        lambda: cpp.IMPLS["embed_rows"](torch.tensor([2]), x, eighths),
        lambda: likeliest(eighths),
    ):
        with pytest.raises(ValueError, match=r"impl='cpp': float8_e4m3fn .* accepted: float32, bfloat16, float16"):
            call()


def test_pools_that_are_not_read_in_place_are_refused() -> None:
    plan = Plan.from_segments([([0], 3, 0, 0, 2)], [1, 2])
    q, pages = normal(2, 2, 16, dtype=torch.float32), normal(2, 4, 2, 16, dtype=torch.float32)
    apart = torch.stack((pages, pages), dim=-1)[..., 0]
    with pytest.raises(ValueError, match=r"impl='cpp': v_pages: strides .* accepted: the last one 1"):
        committee_attention(q, pages, apart, plan, impl="cpp")
    scale = torch.ones(2, 4, 2, 2)[..., 0]
    with pytest.raises(ValueError, match=r"impl='cpp': k_scale: strides .* accepted: a contiguous tensor"):
        committee_attention(
            q, pages.to(FP8), pages.to(FP8), plan, k_scale=scale, v_scale=scale.contiguous(), impl="cpp"
        )
    turn, slots = torch.ones(2, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"impl='cpp': k_pages: strides .* accepted: the last one 1"):
        rope_and_store(q, q, q, turn, turn, slots, apart, pages, impl="cpp")
    with pytest.raises(ValueError, match=r"impl='cpp': float64 .* accepted: float32, bfloat16, float16"):
        committee_attention(q.double(), pages, pages, plan, impl="cpp")
