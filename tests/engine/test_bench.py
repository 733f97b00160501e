"""Benchmarks: what they print, that nothing wrong is ever timed, and what the GPU suite says of its targets. No test reads a time."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.conftest import Bench
from whispers_engine.bench import attention, kernels, llama, measure, peers, targets, throughput
from whispers_kernels import reference
from whispers_kernels.verify import checks

ROOT = Path(__file__).parents[2]
SWEEP = ("bench", "kernels", "--device", "cpu", "--heads", "4x2x16", "--experts", "1,3", "--context", "40,130")
TINY = ("bench", "throughput", "--device", "cpu", "--shape", "tiny", "--context", "40", "--new-tokens", "4")


def one_per_cent_off(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference.committee_attention(*args)
    return out * 1.01, lse


def one_nan(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference.committee_attention(*args)
    out[0, 0, 0] = torch.nan
    return out, lse


def wrong_in_the_end() -> Callable[..., tuple[Tensor, Tensor]]:
    """Right when it is first called, and wrong after that."""
    calls = itertools.count()
    return lambda *args: (one_nan if next(calls) else reference.committee_attention)(*args)


def raises(*args: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no such instruction")


def test_kernels_prints_the_documented_object(bench: Bench) -> None:
    status, printed = bench(*SWEEP, "--json")
    report = json.loads(printed)
    assert status == 0 and report["ok"]
    assert {"device", "versions", "command", "ceilings", "results", "crossover"} <= report.keys()
    assert report["command"].startswith("whispers bench kernels --device cpu")
    assert set(report["ceilings"]) == {"GB_s", "GFLOP_s"} and min(report["ceilings"].values()) > 0
    sweep = [result for result in report["results"] if result["op"] == "committee_attention"]
    assert [(result["experts"], result["context"]) for result in sweep] == [(1, 40), (1, 130), (3, 40), (3, 130)]
    for result in report["results"]:
        assert {
            "dtype",
            "ours_ms",
            "peers",
            "floor_share",
            "GB_s",
            "TFLOP_s",
            "bytes",
            "error",
            "budget",
        } <= result.keys()
        assert result["peers"]
        for peer in result["peers"].values():
            assert peer["ratio"] == pytest.approx(peer["ms"] / result["ours_ms"], rel=1e-3)
        floor = (
            max(result["bytes"] / report["ceilings"]["GB_s"], result["flops"] / report["ceilings"]["GFLOP_s"]) * 1e-6
        )
        assert result["floor_share"] == pytest.approx(floor / result["ours_ms"], rel=1e-3)
    assert {result["op"] for result in report["results"]} == set(reference.IMPLS) - {"add_rms_norm"}
    # Three rows of 4 heads of 16, over 130 shared keys and 32 own ones each, on 2 KV heads, float32.
    assert sweep[3]["bytes"] == 4 * (2 * 16 * 2 * (130 + 3 * 32) + 2 * 3 * 4 * 16)
    assert sweep[3]["flops"] == 4 * 3 * 4 * 16 * (130 + 32)
    assert sweep[3]["left_out"] == dict.fromkeys(("flashinfer-cascade", "flash-attn", "flex"), "cuda only")


def test_kernels_prints_a_table_and_draws(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "ratios.svg"
    status, printed = bench(*SWEEP, "--no-ops", "--plot", str(plot))
    assert status == 0 and "sdpa-repeated" in printed and "floor" in printed and "rms_norm" not in printed
    assert plot.read_text().lstrip().startswith("<?xml") and list(tmp_path.iterdir()) == [plot]


@pytest.mark.parametrize("wrong", [one_per_cent_off, one_nan, raises, wrong_in_the_end])
def test_what_is_wrong_is_not_timed(bench: Bench, planted: Callable[..., None], wrong: Callable[..., Any]) -> None:
    planted("committee_attention", wrong() if wrong is wrong_in_the_end else wrong)
    status, printed = bench(*SWEEP, "--no-ops", "--impl", "planted", "--json")
    report = json.loads(printed)
    assert status == 1 and not report["ok"] and len(report["results"]) == 4
    for result in report["results"]:
        assert not result["ok"] and not {"ours_ms", "peers", "GB_s", "floor_share"} & result.keys()
    status, printed = bench(*SWEEP, "--no-ops", "--impl", "planted")
    assert status == 1 and ("FAILED" if wrong is raises else "WRONG") in printed and "%" not in printed


def test_a_wrong_small_operation_is_not_timed(bench: Bench, planted: Callable[..., None]) -> None:
    planted("silu_mul", lambda gate_up: reference.silu_mul(gate_up) * 1.001)
    status, printed = bench(*SWEEP, "--experts", "1", "--context", "40", "--impl", "planted", "--json")
    results = json.loads(printed)["results"]
    assert status == 1
    for result in results:
        assert result["ok"] == ("ours_ms" in result) == (result["op"] != "silu_mul")


def test_a_peer_that_fails_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(inputs: attention.DecodeInputs) -> list[measure.Call]:
        return [lambda: torch.zeros_like(inputs.q[0])]

    def fails(inputs: attention.DecodeInputs) -> list[measure.Call]:
        raise RuntimeError("not today\nnor tomorrow")

    for name, build, size in (("wrong", zeros, 0), ("failing", fails, 0), ("huge", zeros, 1 << 60)):
        monkeypatch.setitem(peers.PEERS, name, peers.Peer(build, lambda shape, size=size: size))  # type: ignore[misc]
    status, printed = bench(*SWEEP, "--no-ops", "--json")
    result = json.loads(printed)["results"][0]
    assert status == 0 and set(result["peers"]) == {"sdpa-repeated"}
    assert result["left_out"]["wrong"].startswith("wrong: error") and "GB" in result["left_out"]["huge"]
    assert result["left_out"]["failing"] == "RuntimeError: not today"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block mask and its layout, by PyTorch's own definition of FlexAttention, which needs no GPU."""

    class LooksLikeCuda(str):
        type = "cuda"

    monkeypatch.setattr(torch, "compile", lambda function, **keywords: function)
    monkeypatch.setattr(measure, "_SPAN_CPU", 1)
    shape = attention.DecodeShape("4x2x16", attention.Heads(4, 2, 16), 5, 150, torch.float32)
    inputs = attention.DecodeInputs(shape, torch.device("cpu"))
    inputs.device = LooksLikeCuda("cpu")  # type: ignore[assignment]
    assert inputs.judge(peers.flex(inputs)[0]()).ok


def test_refusals(bench: Bench) -> None:
    for arguments in (
        (*SWEEP, "--heads", "llama-9b"),
        (*SWEEP, "--heads", "4x3x16"),
        (*SWEEP, "--experts", "1,two"),
        (*SWEEP, "--context", "0"),
        (*SWEEP, "--peers", "sdpa"),
        (*SWEEP, "--impl", "cuda"),
        (*SWEEP, "--impl", "triton"),  # its interpreter's times mean nothing
        (*SWEEP, "--plot", "ratios.txt"),
        (*TINY, "--shape", "llama-9b"),
        (*TINY, "--new-tokens", "2"),
        (*TINY, "--peers", "llama.cpp"),
    ):
        status, printed = bench(*arguments)
        assert status == 1 and "accepted" in printed, arguments


def test_time_that_is_over_leaves_shapes_out(bench: Bench) -> None:
    status, printed = bench(*SWEEP, "--seconds", "0", "--json")
    report = json.loads(printed)
    assert status == 0 and report["results"] == []
    assert "attention, 4x2x16, 3 experts, 130 keys" in report["left_out"]


def test_crossover_is_where_no_peer_is_faster_any_more() -> None:
    def result(experts: int, context: int, *ratios: float) -> dict[str, Any]:
        named = {str(index): {"ratio": ratio} for index, ratio in enumerate(ratios)}
        return {"op": "committee_attention", "heads": "h", "experts": experts, "context": context, "peers": named}

    sweep = [result(1, 1, 2.0), result(1, 2, 0.9), result(1, 4, 1.0, 3.0), result(1, 8, 2.0), result(4, 1, 0.5)]
    found = {entry["experts"]: entry["context"] for entry in kernels.crossovers(sweep)}
    assert found == {1: 4, 4: None}


def test_throughput_beside_transformers(bench: Bench) -> None:
    status, printed = bench(*TINY, "--experts", "1,3", "--json")
    report = json.loads(printed)
    assert status == 0 and report["check"]["ok"] and report["check"]["error"] < 1e-3
    one, three = report["results"]
    for result in (one, three):
        assert set(result["peers"]) == {"transformers-fp32", "transformers-static-fp32"}
        assert result["tokens_equal"] == dict.fromkeys(result["peers"], 1.0)
        assert result["tokens_s"] == pytest.approx(1e3 * result["experts"] / result["ours_ms"], rel=1e-3)
        assert result["floor_share"] == pytest.approx(result["floor_ms"] / result["ours_ms"], rel=1e-3)
    assert one["over_one_expert"] == 1.0
    assert three["over_one_expert"] == pytest.approx(three["ours_ms"] / one["ours_ms"], rel=1e-3)


def test_throughput_of_a_wrong_engine_is_not_measured(bench: Bench, planted: Callable[..., None]) -> None:
    planted("silu_mul", lambda gate_up: reference.silu_mul(gate_up) * 1.1)
    status, printed = bench(*TINY, "--impl", "planted", "--json")
    report = json.loads(printed)
    assert status == 1 and not report["check"]["ok"] and report["results"] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_check_of_whole_steps_in_half_precision(dtype: torch.dtype) -> None:
    shape, device = llama.SHAPES["tiny"], torch.device("cpu")
    assert throughput.check(shape, dtype, device, "reference")["ok"]


# --- the GPU suite -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "benchmarks" / "gpu_suite.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_suite", module)
    spec.loader.exec_module(module)
    return module


def report(ratio: float = 2.0, ok: bool = True, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `bench kernels` could print of one shape."""
    result = {
        "op": "committee_attention",
        "heads": "llama-8b",
        "experts": 8,
        "context": 32768,
        "bytes": 135e6,
        "limit": "bandwidth",
        "GB_s": 900.0,
        "TFLOP_s": 1.0,
        "floor_ms": 0.9,
        "ours_ms": 1.0,
        "peers": {"sdpa-repeated": {"ms": 7.0, "ratio": 7.0}, "flex": {"ms": ratio, "ratio": ratio}},
        "ok": ok,
    }
    ceilings = {"GB_s": 1000.0, "GFLOP_s": 1e6}
    return {"ceilings": ceilings, "results": [result], "left_out": list(left_out), "ok": ok}


def test_targets_are_judged_by_their_worst_shape() -> None:
    rows = targets.verdicts([report(), report(ratio=0.9)], [])
    assert [row["verdict"] for row in rows] == ["met", "not measured", "missed", "met", "not measured", "not measured"]
    assert rows[0]["measured"] == 0.9 and rows[2]["measured"] == 0.9 and "flex" in rows[2]["where"]
    assert rows[3]["measured"] == 7.0 / min(4, 0.7 * 7 / 0.9)
    unfinished = targets.verdicts([report(), report(left_out=("attention, somewhere", "silu_mul, 8"))], [])
    assert [row["verdict"] for row in unfinished[:4]] == ["met", "not measured", "met so far", "met"]
    assert all(
        row["verdict"] == "not measured" and row["measured"] is None for row in targets.verdicts([report(ok=False)], [])
    )


def test_suite_lists_its_targets(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--list-targets"])
    assert suite.main() == 0
    listed = capsys.readouterr().out
    assert len(targets.TARGETS) == 6 and listed.count("not measured") == 6
    assert all(target.text in listed for target in targets.TARGETS)


def test_suite_leaves_no_check_out(suite: ModuleType) -> None:
    stages = [stage.arguments for stage in suite.STAGES if stage.kind == "check"]
    only = [arguments[arguments.index("--only") + 1] for arguments in stages]
    assert all(sum(text in check.name for text in only) == 1 for check in checks("reference", torch.device("cpu")))


def test_suite_without_a_gpu_writes_nothing(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path / "results")])
    assert suite.main() == 2
    captured = capsys.readouterr()
    assert "no GPU" in captured.err and captured.out.count("not measured") == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("green", [True, False])
def test_suite_measures_only_behind_a_green_check(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, green: bool
) -> None:
    def stage(name: str, kind: str, printed: Any, status: int = 0, paced: bool = False) -> Any:
        code = f"import sys; print({json.dumps(printed)!r}); sys.exit({status})"
        return suite.Stage(name, kind, ("-c", code), 60, paced)

    stages = (
        stage("verify", "check", {"ok": green}, status=0 if green else 1),
        stage("sweep", "kernels", report(), paced=True),
        suite.Stage("slow", "throughput", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 30.5),
    )
    monkeypatch.setattr(suite, "STAGES", stages[:2])
    monkeypatch.setattr(measure, "environment", lambda device, command: {"device": "A GPU (SXM)", "command": command})
    monkeypatch.setattr(suite, "driver", lambda: "1.2")
    assert suite.suite(tmp_path, 150.0) == (0 if green else 1)
    (written,) = tmp_path.iterdir()
    found = json.loads(written.read_text())
    assert (
        written.name == "gpu-a-gpu-sxm.json" and found["complete"] and found["ok"] == green and found["driver"] == "1.2"
    )
    assert found["stages"][1].get("failure") == (None if green else "a check is red")
    assert ("report" in found["stages"][1]) == green
    assert [row["verdict"] == "not measured" for row in found["targets"][:4]] == [not green, True, not green, not green]
    # What is left is the sweep's, which ends itself a little earlier.
    assert ("--seconds 12" in found["stages"][1].get("command", "")) == green
    late = suite.run(stages[2], 1.0)
    assert late["failure"] == "not finished in 1 s" and late["output"] == "begun\n" and late["seconds"] < 30
