"""The four stateless operations agree with their formulas, written here in float64, for every dtype and odd shapes.

Unless a test says otherwise, the error allowed is one rounding of the exact result to its dtype plus a few float32 roundings.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.kernels.rounding import assert_rounded_once, every_dtype, normal
from whispers_kernels import embed_rows, pool_logits, rms_norm, silu_mul

INF, NAN = math.inf, math.nan
every_rule = pytest.mark.parametrize("rule", ["mixture", "product"])


# --- embed_rows --------------------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("soft_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary, hidden", [(1, 1), (7, 5), (65, 33)])
def test_embed_rows(dtype: torch.dtype, soft_dtype: torch.dtype | None, vocabulary: int, hidden: int) -> None:
    table = normal(vocabulary, 2 * hidden, dtype=dtype)[:, ::2]
    soft = None if soft_dtype is None else normal(3, hidden, dtype=soft_dtype, seed=1)
    both = table if soft is None else torch.cat((table, soft.to(dtype)))
    ids = [0, vocabulary - 1, len(both) - 1, min(vocabulary, len(both) - 1), 0]
    out = embed_rows(torch.tensor(ids), table, soft, impl="reference")
    assert out.dtype == dtype and torch.equal(out, torch.stack([both[i] for i in ids]))
    assert embed_rows(torch.tensor([], dtype=torch.int64), table, soft, impl="reference").shape == (0, hidden)


# --- rms_norm ----------------------------------------------------------------------------------------------------------------------


def rms_norm_exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean_square = (x.double() ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return x.double() / torch.sqrt(mean_square + eps) * weight.double()


@every_dtype
@pytest.mark.parametrize("layout", ["dense", "every other column", "transposed"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 20), (3, 33), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(dtype: torch.dtype, layout: str, shape: tuple[int, ...], eps: float) -> None:
    def make(seed: int) -> Tensor:
        if layout == "every other column":
            return normal(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=seed)[..., ::2]
        if layout == "transposed":
            return normal(*shape[:-2], shape[-1], shape[-2], dtype=dtype, seed=seed).mT
        return normal(*shape, dtype=dtype, seed=seed)

    x, residual, weight = make(0), make(1), normal(shape[-1], dtype=dtype, seed=2)
    x[0] = 0
    out = rms_norm(x, weight, eps, impl="reference")
    assert isinstance(out, Tensor) and out.dtype == dtype
    assert_rounded_once(out, rms_norm_exact(x, weight, eps))

    out, total = rms_norm(x, weight, eps, residual, impl="reference")
    assert out.dtype == total.dtype == dtype
    assert_rounded_once(total, x.double() + residual.double())
    assert_rounded_once(out, rms_norm_exact(total, weight, eps))  # of the sum as it is returned, rounded


def test_rms_norm_takes_a_weight_of_another_dtype() -> None:
    x, weight = normal(4, 9, dtype=torch.bfloat16), normal(9, dtype=torch.float32, seed=1)
    out = rms_norm(x, weight, 1e-5, impl="reference")
    assert isinstance(out, Tensor) and out.dtype == torch.bfloat16
    assert_rounded_once(out, rms_norm_exact(x, weight, 1e-5))


# --- silu_mul ----------------------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("rows, width", [(0, 4), (1, 1), (5, 7), (3, 129)])
def test_silu_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = normal(rows, 4 * width, dtype=dtype)[:, ::2] * 3
    gate_up[:1, 0], gate_up[-1:, 0] = 60, -60
    out = silu_mul(gate_up, impl="reference")
    assert out.dtype == dtype
    gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
    assert_rounded_once(out, gate / (1 + torch.exp(-gate)) * up)


# --- pool_logits -------------------------------------------------------------------------------------------------------------------


def pool_exact(logits: Tensor, weights: Tensor, bounds: list[int], rule: str) -> Tensor:
    """Token by token with Python's floats; a token of probability 0 has log-probability -inf."""

    def log(x: float) -> float:
        return math.log(x) if x > 0 else -INF

    rows = []
    for begin, end in itertools.pairwise(bounds):
        asked = [
            (w, logits[r].double().exp().tolist()) for r, w in enumerate(weights.tolist()) if begin <= r < end and w > 0
        ]
        shares = [(w, [x / sum(row) for x in row]) for w, row in asked]
        tokens = range(logits.shape[1])
        if rule == "mixture":
            rows.append([log(sum(w * p[t] for w, p in shares)) for t in tokens])
        else:
            powers = [math.exp(sum(w * log(p[t]) for w, p in shares)) for t in tokens]
            rows.append([log(x) - log(sum(powers)) if x > 0 else -INF for x in powers])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(bounds) - 1, logits.shape[1])


def pooled(logits: Tensor, weights: list[float], bounds: list[int], rule: str) -> Tensor:
    """The result, checked against `pool_exact`; a log-probability is off by a few float32 roundings of itself or 1."""
    shares = torch.tensor(weights)
    out = pool_logits(logits, shares, torch.tensor(bounds, dtype=torch.int32), rule, impl="reference")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), pool_exact(logits, shares, bounds, rule), rtol=1e-6, atol=2e-6)
    return out


@every_dtype
@every_rule
@pytest.mark.parametrize("vocabulary", [1, 7, 257])
def test_pool_logits_of_several_groups(dtype: torch.dtype, rule: str, vocabulary: int) -> None:
    logits = normal(6, 2 * vocabulary, dtype=dtype)[:, ::2] * 4
    out = pooled(logits, [0.25, 0.75, 1.0, 0.5, 0.0, 0.5], [0, 2, 3, 6], rule)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(3))


@every_rule
@pytest.mark.parametrize("value", [-INF, NAN])
def test_a_row_of_weight_0_is_left_out_whatever_it_holds(rule: str, value: float) -> None:
    logits = normal(3, 5)
    without = pooled(logits[::2], [0.25, 0.75], [0, 2], rule)
    logits[1] = value
    assert torch.equal(pooled(logits, [0.25, 0.0, 0.75], [0, 3], rule), without)


@every_rule
def test_one_expert_or_identical_experts_are_their_own_pool(rule: str) -> None:
    logits = normal(1, 9, dtype=torch.float32)
    alone = pooled(logits, [1.0], [0, 1], rule)
    torch.testing.assert_close(alone, logits.log_softmax(-1))
    torch.testing.assert_close(pooled(logits.expand(3, -1), [0.2, 0.3, 0.5], [0, 3], rule), alone)


@every_dtype
def test_a_token_ruled_out_by_one_expert(dtype: torch.dtype) -> None:
    logits = normal(2, 4, dtype=dtype)
    logits[0, 1] = logits[:, 2] = -INF
    assert pooled(logits, [0.5, 0.5], [0, 2], "mixture").isfinite().tolist() == [[True, True, False, True]]
    assert pooled(logits, [0.5, 0.5], [0, 2], "product").isfinite().tolist() == [[True, False, False, True]]


def test_a_product_that_rules_every_token_out_is_minus_infinity_throughout() -> None:
    logits = torch.tensor([[0.0, -INF, 1.0], [-INF, 0.0, -INF], [1.0, 2.0, 3.0]])
    out = pool_logits(
        logits, torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0, 2, 3], dtype=torch.int32), "product", impl="reference"
    )
    assert out[0].tolist() == [-INF] * 3
    torch.testing.assert_close(out[1], logits[2].log_softmax(-1))
    assert pooled(logits[:2], [0.5, 0.5], [0, 2], "mixture").isfinite().all()


@every_rule
def test_no_groups(rule: str) -> None:
    assert pooled(normal(0, 3), [], [0], rule).shape == (0, 3)
