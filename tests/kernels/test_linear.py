"""Packed linears of the C++ kernels against float64, in every instruction set that is here."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from whispers_kernels import available_impls
from whispers_kernels.memory import Memory

from .impls import poison
from .rounding import normal

pytestmark = pytest.mark.skipif("cpp" not in available_impls(), reason="needs the C++ kernels")
if "cpp" in available_impls():
    from whispers_kernels.cpp import isa, isas
    from whispers_kernels.cpp.linear import PackedLinear
    from whispers_kernels.cpp.packing import quantize, quantize_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Outputs and inputs: one; no whole block, panel, word; several panels and a narrower one; whole ones.
SHAPES = ((1, 1), (17, 2), (49, 7), (50, 33), (130, 1001), (96, 576))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def assert_as_good(actual: Tensor, exact: Tensor, torchs: Tensor, size: Tensor) -> None:
    """At most twice torch's error, or half a unit in the last place and what float32 sums of numbers of this `size` lose."""
    excess = (actual.double() - exact).abs() - torch.maximum(
        2 * (torchs.double() - exact).abs(),
        torch.finfo(actual.dtype).eps / 2 * exact.abs() * 1.01 + 2**-21 * size,
    )
    assert torch.isfinite(actual).all()
    assert bool((excess <= torch.finfo(actual.dtype).smallest_normal).all()), f"beyond the budget by {excess.max()}"


def products(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64; and of magnitudes."""
    x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    return F.linear(x, weight, bias), F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())


@every_dtype
@every_shape
@pytest.mark.parametrize("rows", (1, 8, 19))
def test_products(dtype: torch.dtype, shape: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = normal(*shape, dtype=dtype), normal(shape[0], dtype=dtype, seed=1)
    x, residual = normal(rows, shape[1], dtype=dtype, seed=2), normal(rows, shape[0], dtype=dtype, seed=3)
    poison(monkeypatch)
    exact, size = products(x, weight, bias)
    assert_as_good(PackedLinear(weight, bias)(x), exact, F.linear(x, weight, bias), size)
    torchs = F.linear(x, weight) + residual
    exact, size = products(x, weight, None)
    assert_as_good(PackedLinear(weight)(x, residual), exact + residual.double(), torchs, size + residual.abs())


@every_dtype
@pytest.mark.parametrize("shape", ((2, 1), (18, 33), (130, 1001), (96, 576)), ids=str)
def test_gated(dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # Inputs small enough that gates are where silu bends.
    weight, bias = normal(*shape, dtype=dtype), normal(shape[0], dtype=dtype, seed=1)
    x = normal(9, shape[1], seed=2).div(math.sqrt(shape[1])).to(dtype)
    poison(monkeypatch)
    actual = PackedLinear(weight, bias, gated=True)(x)
    (gate, up), (gate_size, up_size) = (part.chunk(2, 1) for part in products(x, weight, bias))
    torch_gate, torch_up = F.linear(x, weight, bias).chunk(2, 1)
    size = 1.1 * gate_size * up.abs() + F.silu(gate).abs() * up_size  # silu's slope is below 1.1
    assert_as_good(actual, F.silu(gate) * up, F.silu(torch_gate) * torch_up, size)


@every_dtype
def test_gates_of_any_size(dtype: torch.dtype) -> None:
    weight = torch.eye(2, dtype=dtype)  # the gate is a row's first number, what it lets through the second
    gates = [0.0, 1e-3, 1.0, 17.0, 60.0, 87.0, 88.5, 89.0, 200.0, 3e4, torch.finfo(dtype).max / 2]
    gates += [-gate for gate in gates]
    x = torch.tensor([[gate, 1.5] for gate in gates], dtype=dtype)
    want = F.silu(x[:, :1].double()) * 1.5
    actual = PackedLinear(weight, gated=True)(x).double()
    # float32 ends at e^88: what is smaller than its inverse may be 0.
    torch.testing.assert_close(actual, want, rtol=2 * torch.finfo(dtype).eps, atol=max(1e-36, torch.finfo(dtype).tiny))


@every_dtype
@every_shape
def test_int8(dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = normal(*shape, dtype=dtype), normal(shape[0], dtype=dtype, seed=1)
    x = normal(19, shape[1], dtype=dtype, seed=2)
    x[3] = 0
    (w, w_scale), (numbers, x_scale) = (
        (part.double() for part in pair) for pair in (quantize(weight), quantize_rows(x))
    )
    poison(monkeypatch)
    actual = PackedLinear(weight, bias, "int8")(x)
    exact, size = products(numbers * x_scale, w * w_scale[:, None], bias)
    assert_as_good(actual, exact, exact, size)
    # And the quantisation itself: half a step of each factor, times the other.
    lost = F.linear(x_scale / 2, w.abs() * w_scale[:, None]) + F.linear(
        x.double().abs(), (w_scale / 2)[:, None].expand_as(w)
    )
    true, _ = products(x, weight, bias)
    assert bool(((exact - true).abs() <= 1.0001 * lost).all())


@every_dtype
@pytest.mark.parametrize("quantization", (None, "int8"))
@pytest.mark.parametrize("gated", (False, True))
def test_same_bits_in_any_company(dtype: torch.dtype, quantization: str | None, gated: bool) -> None:
    packed = PackedLinear(normal(130, 133, dtype=dtype), normal(130, dtype=dtype, seed=1), quantization, gated)
    x = normal(130, 133, dtype=dtype, seed=2)
    every = packed(x)
    for rows in range(1, 130):
        assert torch.equal(packed(x[:rows]), every[:rows])
        assert torch.equal(packed(x[rows : rows + 1]), every[rows : rows + 1])


@every_dtype
@pytest.mark.parametrize("quantization", (None, "int8"))
def test_rows(dtype: torch.dtype, quantization: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, soft = normal(101, 35, dtype=dtype), normal(3, 35, dtype=torch.float32, seed=1)
    table = weight if quantization is None else torch.mul(*[t.unsqueeze(-1).flatten(1) for t in quantize(weight)])
    ids = torch.tensor([100, 0, 103, 47, 48, 95, 96, 101])
    poison(monkeypatch)
    packed = PackedLinear(weight, quantization=quantization)
    assert torch.equal(packed.rows(ids, soft, dtype), torch.cat([table.float(), soft])[ids].to(dtype))


def test_views_and_memory() -> None:
    weight, x = normal(64, 40, dtype=torch.bfloat16), normal(5, 40, dtype=torch.bfloat16, seed=1)
    memory = Memory()
    one, other = PackedLinear(weight, memory=memory), PackedLinear(weight.flip(0), memory=memory)
    strided = torch.empty(5, 80, dtype=torch.bfloat16)[:, ::2].copy_(x)
    wide = torch.empty(5, 83, dtype=torch.bfloat16)[:, 1:41].copy_(x)  # an odd stride: rows that begin within a word
    assert torch.equal(one(strided), one(x)) and torch.equal(one(wide), one(x))
    assert torch.equal(other(x), one(x).flip(1))
    assert one(x[:0]).shape == (0, 64)


def powers(*shape: int) -> Tensor:
    """Powers of 2 from 2^-30 to 2^29, bfloat16."""
    exponents = torch.randint(-30, 30, shape, generator=torch.Generator().manual_seed(4))
    return torch.pow(2.0, exponents).bfloat16()


def test_bfloat16_in_12_bits_loses_none() -> None:
    weight = normal(112, 576, dtype=torch.bfloat16)
    for at, value in enumerate((0.0, -0.0, 1e-9, -1e-30, 1e-40, 3e38, math.inf, -math.inf)):
        weight[7 * at, 31 * at] = value
    packed = PackedLinear(weight)
    assert packed.nbytes < 0.77 * weight.nbytes
    assert torch.equal(packed.rows(torch.arange(112)).view(torch.int16), weight.view(torch.int16))
    # Those without a code are added behind all others, one row or a prefill's: as good as the others, whatever they are next to.
    finite = weight.where(weight.abs() < 2.0**30, 1)
    finite[50:52, ::32] *= powers(2, 18)
    packed, x = PackedLinear(finite), normal(40, 576, dtype=torch.bfloat16, seed=1)
    assert packed.nbytes < 0.77 * weight.nbytes
    exact, size = products(x, finite, None)
    for rows in (1, 8, 40):
        assert_as_good(packed(x[:rows]), exact[:rows], F.linear(x[:rows], finite), size[:rows])


def from_few_bits(kind: str, weight: Tensor) -> Tensor:
    """What GGUF's blocks of that kind keep of it, as bfloat16."""
    quants, kinds = pytest.importorskip("gguf.quants"), pytest.importorskip("gguf").GGMLQuantizationType
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kinds[kind]), kinds[kind])).bfloat16()


@pytest.mark.parametrize("size", (1e-3, 1.0))
@pytest.mark.parametrize("kind, bits", (("Q4_0", 5), ("Q4_1", 5), ("Q8_0", 9)))
def test_weights_that_come_from_few_bits_need_few_and_lose_none(
    kind: str, bits: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(112, 576, dtype=torch.float32) * size
    weight[:, :32] += 4 * size  # farther from 0 than from each other
    weight[5], weight[6, 32:64] = 0, size  # all alike
    table = from_few_bits(kind, weight)
    poison(monkeypatch)
    packed = PackedLinear(table)
    needed = bits / 16 if isa() == "amx" else 0.77
    assert packed.nbytes <= needed * table.nbytes
    assert torch.equal(packed.rows(torch.arange(112)), table)
    x = normal(40, 576, dtype=torch.bfloat16, seed=1)
    exact, sums = products(x, table, None)
    for rows in (1, 8, 19, 40):
        assert_as_good(packed(x[:rows]), exact[:rows], F.linear(x[:rows], table), sums[:rows])
        assert torch.equal(packed(x[:rows]), packed(x)[:rows])


@pytest.mark.parametrize("kind", ("Q4_1", "Q8_0"))
def test_one_weight_off_its_grid_is_kept_as_it_is(kind: str) -> None:
    table = from_few_bits(kind, normal(112, 576, dtype=torch.float32))
    table[50, 100] = 1e-6
    for weight in (table, table[:, :570].contiguous()):  # and a depth that is no whole number of blocks
        packed = PackedLinear(weight)
        assert 0.7 * weight.nbytes < packed.nbytes < 0.77 * weight.nbytes
        assert torch.equal(packed.rows(torch.arange(112)), weight)


def test_weights_of_every_magnitude_keep_16_bits() -> None:
    weight = normal(96, 64, dtype=torch.bfloat16) * powers(96, 64)
    packed, x = PackedLinear(weight), normal(3, 64, dtype=torch.bfloat16, seed=1)
    assert packed.nbytes == weight.nbytes
    exact, size = products(x, weight, None)
    assert_as_good(packed(x), exact, F.linear(x, weight), size)


@pytest.mark.parametrize("quantization", (None, "int8"))
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_what_is_not_finite_shows_in_its_row_alone(quantization: str | None, bad: float) -> None:
    x = normal(3, 40, dtype=torch.float32)
    x[1, 7] = bad
    finite = torch.isfinite(PackedLinear(normal(20, 40, dtype=torch.float32), quantization=quantization)(x))
    assert finite[0].all() and finite[2].all() and not finite[1].any()


def test_refusals() -> None:
    weight = normal(10, 6, dtype=torch.float32)
    packed = PackedLinear(weight)
    for match, call in {
        r"weight: \[6\]": lambda: PackedLinear(weight[0]),
        r"weight: \[0, 6\]": lambda: PackedLinear(weight[:0]),
        "weight: torch.float64": lambda: PackedLinear(weight.double()),
        "on meta": lambda: PackedLinear(weight.to("meta")),
        r"bias: \[9\]": lambda: PackedLinear(weight, torch.zeros(9)),
        "quantization: 'int4'": lambda: PackedLinear(weight, quantization="int4"),
        "even number": lambda: PackedLinear(weight[:9], gated=True),
        r"x: \[2, 5\]": lambda: packed(torch.zeros(2, 5)),
        "x: torch.int64": lambda: packed(torch.zeros(2, 6, dtype=torch.int64)),
        r"residual: \[2, 9\]": lambda: packed(torch.zeros(2, 6), torch.zeros(2, 9)),
        "ids: 0 to 10; accepted: 0 to 9": lambda: packed.rows(torch.tensor([0, 10])),
        "ids: -1 to 0": lambda: packed.rows(torch.tensor([0, -1])),
        r"soft: \[1, 5\]": lambda: packed.rows(torch.tensor([10]), torch.zeros(1, 5)),
        "dtype: torch.int8": lambda: packed.rows(torch.tensor([0]), dtype=torch.int8),
        "residual: of a gated matrix": lambda: PackedLinear(weight, gated=True)(
            torch.zeros(1, weight.shape[1]), residual=torch.zeros(1, weight.shape[0] // 2)
        ),
        "rows: of a gated matrix": lambda: PackedLinear(weight, gated=True).rows(torch.tensor([0])),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_the_other_instruction_sets() -> None:
    """These tests again, each set in a process of its own: it is chosen once."""
    for name in isas():
        if name != isa() and "WHISPERS_ISA" not in os.environ:
            command = [sys.executable, "-m", "pytest", "-q", "--numprocesses=0", str(Path(__file__))]
            done = subprocess.run(command, env={**os.environ, "WHISPERS_ISA": name}, capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}"
