"""Every variant of every Triton kernel compiles for GPUs that are not here, without spills and within shared memory; and the gate can fail.

Compiling happens in processes of their own: this one may interpret Triton's kernels, which is settled when Triton is imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import triton
import triton.language as tl

from whispers_kernels.triton import aot
from whispers_kernels.triton.common import Variant

ROOT = Path(__file__).parents[2]
FINE = aot.Report("toy", "fine", "sm_90", registers=128, shared=64 << 10, ctas=2)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """This interpreter with these arguments, compiling kernels where Triton would interpret them."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


# --- the gate over what an engine launches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", list(aot.CHIPS))
def test_every_variant_is_green(target: str) -> None:
    done = run("-m", "whispers_kernels.triton.aot", "--target", target, "--json")
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    red = [
        f"{result['kernel']}: {result['variant']}: {result['red']}" for result in found["results"] if not result["ok"]
    ]
    assert not red, "\n".join(red)
    assert found["ok"] and done.returncode == 0
    wanted = {(job.kernel, job.variant.name) for job in aot.all_jobs() if job.target == target}
    assert {(result["kernel"], result["variant"]) for result in found["results"]} == wanted


def test_every_kernel_has_variants_of_different_names() -> None:
    jobs = [(job.kernel, job.variant.name, job.target) for job in aot.all_jobs()]
    assert len(jobs) == len(set(jobs))
    kernels = {"attention", "embed_rows", "pool_logits", "rms_norm", "rope_and_store", "silu_mul"}
    assert {(kernel, target) for kernel, _, target in jobs} == {(k, t) for k in kernels for t in aot.CHIPS}


def test_page_names_every_variant() -> None:
    """Names, not figures: those differ between versions of Triton."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    generated = page[page.index(aot.BEGIN) : page.index(aot.END)]
    named = set()
    for part in generated.split("### `")[1:]:
        kernel = part[: part.index("`")]
        rows = re.findall(rf"^\| (.+?) \| ({'|'.join(aot.CHIPS)}) \|", part, re.MULTILINE)
        named |= {(kernel, variant, target) for variant, target in rows}
    wanted = {(job.kernel, job.variant.name, job.target) for job in aot.all_jobs()}
    assert named == wanted, "stale: python -m whispers_kernels.triton.aot --write docs/kernels.md"


# --- kernels that are red ----------------------------------------------------------------------------------------------------------


@triton.jit
def held(x, out, BLOCK: tl.constexpr):
    """Every value waits for the largest: all of BLOCK in registers at once."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(out + at, values - tl.max(values))


@triton.jit
def staged(x, out, count, BLOCK: tl.constexpr):
    """Tiles of a product's arguments, num_stages of them under way in shared memory."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    at = row * BLOCK + column
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(count):
        tile = tl.load(x + i * BLOCK * BLOCK + at)  # [BLOCK, BLOCK]
        other = tl.load(x + (i + count) * BLOCK * BLOCK + at)
        total = tl.dot(tile, other, total)
    tl.store(out + at, total)


@triton.jit
def refused(x, out, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0, "no such block")


class Ends:
    """In a kernel's place: what a compiler that aborts does."""

    @property
    def arg_names(self) -> list[str]:
        os._exit(7)


def toys() -> list[Variant]:
    pointers = {"x": "*fp32", "out": "*fp32"}
    dots = {"x": "*fp16", "out": "*fp32", "count": "i32"}
    return [
        Variant("fine", held, pointers, {"BLOCK": 1024}, 4, 2, ("x", "out")),
        Variant("spills", held, pointers, {"BLOCK": 32768}, 1, 2, ("x", "out")),
        Variant("two stages", staged, dots, {"BLOCK": 64}, 4, 2, ("x", "out")),
        Variant("many stages", staged, dots, {"BLOCK": 64}, 4, 20, ("x", "out")),
        Variant("refused", refused, pointers, {"BLOCK": 64}),
        Variant("unknown", held, {"x": "*fp32"}, {"BLOCK": 64}),
        Variant("ends", Ends(), pointers, {"BLOCK": 64}),
        Variant("behind it", held, pointers, {"BLOCK": 512}, 4, 2, ("x", "out")),
    ]


def toy_reports() -> list[dict[str, Any]]:
    """Runs in a process that compiles. One process below it, so that a job waits behind the one that ends it."""
    jobs = [aot.Job("toy", toy, target) for target in ("sm_80", "gfx942") for toy in toys()]
    jobs.append(aot.Job("toy", toys()[2], "sm_90"))
    reports = list(aot.compile_all(jobs, processes=1))
    assert [(report.variant, report.target) for report in reports] == [(job.variant.name, job.target) for job in jobs]
    return [{**dataclasses.asdict(report), "red": report.red} for report in reports]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict[str, Any]]:
    done = run("-c", "import json; from tests.kernels.test_aot import toy_reports; print(json.dumps(toy_reports()))")
    assert done.returncode == 0, done.stderr
    return {(report["variant"], report["target"]): report for report in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_what_is_red(compiled: dict[tuple[str, str], dict[str, Any]], target: str) -> None:
    for name in ("fine", "two stages", "behind it"):
        report = compiled[name, target]
        assert report["red"] == "" and 0 < report["registers"] < 256 and report["ctas"] > 0
    assert compiled["spills", target]["spills"] > 0 and "spills" in compiled["spills", target]["red"]
    assert "no such block" in compiled["refused", target]["red"]
    assert "out" in compiled["unknown", target]["red"]  # an argument without a type
    assert "exit status 7" in compiled["ends", target]["red"]
    limit = aot.CHIPS[target].shared_a_cta
    many = compiled["many stages", target]
    assert many["shared"] > limit and f"where {limit >> 10} KB fit" in many["red"] and many["ctas"] == 0


def test_matrix_instructions(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    kinds = {target: compiled["two stages", target]["matrix"] for target in ("sm_80", "sm_90", "gfx942")}
    assert kinds["sm_80"] == ["mma m16n8k16 f16"] and kinds["sm_90"] == ["wgmma m64n64k16 f16"]
    assert kinds["gfx942"] and all(re.fullmatch(r"v_mfma_f32_\w+f16", kind) for kind in kinds["gfx942"])
    assert compiled["fine", "sm_80"]["matrix"] == []


# --- the rest, without compiling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"shared": 227 << 10, "ctas": 1}, ""),
        ({"spills": 1}, "spills 1 registers"),
        ({"spills": 1, "scalar_spills": 3}, "spills 1 + 3 scalar registers"),
        ({"shared": (227 << 10) + 1, "ctas": 0}, "of shared memory where 227 KB fit"),
        ({"ctas": 0}, "no CTA fits"),
        ({"error": "CompilationError: x"}, "CompilationError: x"),
    ],
)
def test_red_reports(change: dict[str, Any], reason: str) -> None:
    red = dataclasses.replace(FINE, **change).red
    assert reason in red and bool(red) == bool(reason)


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared_kb", "columns", "ctas"),
    [
        ("sm_90", 4, 168, 80, 0, 2),  # by shared memory
        ("sm_90", 4, 168, 1, 0, 3),  # by registers
        ("sm_90", 8, 129, 16, 0, 1),
        ("sm_90", 4, 32, 0, 0, 16),  # by threads
        ("sm_90", 1, 16, 0, 0, 32),
        ("sm_90", 4, 32, 227, 0, 1),
        ("sm_80", 4, 32, 54, 0, 2),
        ("sm_80", 4, 32, 53, 0, 3),  # 1 KB more is the system's
        ("sm_100", 4, 32, 16, 256, 2),  # by tensor memory
        ("gfx942", 4, 128, 16, 0, 4),
        ("gfx942", 4, 129, 16, 0, 3),
        ("gfx942", 8, 258, 16, 0, 0),
        ("gfx942", 1, 16, 0, 0, 16),
    ],
)
def test_ctas(target: str, warps: int, registers: int, shared_kb: int, columns: int, ctas: int) -> None:
    assert aot.CHIPS[target].ctas(warps, registers, shared_kb << 10, columns) == ctas


@pytest.mark.parametrize(("change", "status"), [({}, 0), ({"spills": 4}, 1)])
def test_command(
    change: dict[str, Any],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    job = aot.Job("toy", Variant("fine", held, {}, {}), "sm_90")
    report = dataclasses.replace(FINE, **change)
    monkeypatch.setattr(aot, "all_jobs", lambda: [job])
    monkeypatch.setattr(aot, "compile_all", lambda jobs, processes: iter([report]))
    assert aot.main(["--json"]) == status
    printed = capsys.readouterr()
    assert json.loads(printed.out)["ok"] == (status == 0)
    assert ("red: toy: fine, sm_90: spills 4 registers" in printed.err) == bool(status)

    page = tmp_path / "page.md"
    page.write_text(f"Above\n{aot.BEGIN}\nold\n{aot.END}\nbelow\n", encoding="utf-8")
    assert aot.main(["--write", str(page)]) == status
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"Above\n{aot.BEGIN}\n") and text.endswith(f"{aot.END}\nbelow\n") and "old" not in text
    assert f"| fine | sm_90 | 128 | {report.spills} | 64.0 | 2 |" in text and ("**red**" in text) == bool(status)
    assert list(tmp_path.iterdir()) == [page]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no generated part"):
        aot.write_page(page, "text")
    assert page.read_text(encoding="utf-8") == "no markers\n"
    write = ["--write", str(page)]
    for arguments in (
        write,
        [*write, "--target", "sm_90"],
        ["--write", "/none"],
        ["--target", "sm_70"],
        ["--kernel", "none"],
    ):
        with pytest.raises(SystemExit) as ended:
            aot.main(arguments)
        assert ended.value.code == 2


@pytest.mark.skipif(not aot.INTERPRETED, reason="this process compiles kernels")
def test_interpreted_kernels_are_not_compiled() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0"):
        list(aot.compile_all([], 1))
