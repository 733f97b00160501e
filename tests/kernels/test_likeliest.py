"""The likeliest token of rows of logits, in C++: the first of the largest, with the log-probability of a pool of one."""

from __future__ import annotations

import math

import pytest
import torch

from whispers_kernels import available_impls, pool_logits

from .impls import poison
from .rounding import normal

pytestmark = pytest.mark.skipif("cpp" not in available_impls(), reason="needs the C++ kernels")

VOCABULARIES = (1, 7, 16, 33, 1536, 1537, 4609)  # chunks have 1536: less, whole ones, one more


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_cpp_takes_the_first_of_the_largest(
    dtype: torch.dtype, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whispers_kernels.cpp.likeliest import likeliest

    logits = normal(9, 2 * vocabulary, dtype=dtype)[:, :vocabulary]
    logits[1] = 3.0  # all alike
    logits[2, vocabulary // 2] = logits[2, -1] = 9.0  # two alike, in different chunks where there are some
    logits[3, :-1] = -math.inf
    one_each = torch.arange(10, dtype=torch.int32)
    logp = pool_logits(logits.contiguous(), torch.ones(9), one_each, "mixture", impl="cpp")
    poison(monkeypatch)
    tokens, logprobs = likeliest(logits)
    expected = torch.tensor([row.tolist().index(row.max()) for row in logits])
    assert torch.equal(tokens, expected)
    # Bits: where all the others are nothing it is 0, not -0.
    assert torch.equal(logprobs.view(torch.int32), logp.gather(1, expected[:, None])[:, 0].view(torch.int32))
    exact = logits.double().log_softmax(1).gather(1, expected[:, None])[:, 0]
    assert float((logprobs.double() - exact).abs().max()) < 1e-5


def test_cpp_names_a_token_of_rows_that_are_no_numbers() -> None:
    from whispers_kernels.cpp.likeliest import likeliest

    logits = torch.tensor([[math.nan] * 20, [-math.inf] * 20, [1.0, math.nan] + [0.0] * 18])
    tokens, logprobs = likeliest(logits)
    assert all(0 <= token < 20 for token in tokens) and bool(logprobs.isnan().all())
    pools = pool_logits(logits, torch.ones(3), torch.arange(4, dtype=torch.int32), "mixture", impl="cpp")
    assert bool(pools.gather(1, tokens[:, None]).isnan().all())
    assert likeliest(torch.zeros(0, 20))[0].shape == (0,)


@pytest.mark.parametrize("shape", [(2, 0), (0, 0), (3,), (1, 2, 3)], ids=str)
def test_cpp_refuses_what_has_no_token(shape: tuple[int, ...]) -> None:
    from whispers_kernels.cpp.likeliest import likeliest

    with pytest.raises(ValueError, match=r"logits: \[.*\]; accepted: \[rows, vocabulary\], at least one token"):
        likeliest(torch.zeros(shape))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("vocabulary", (5, 1536, 4700))
@pytest.mark.parametrize("rows", (0, 1, 9, 40, 150))  # 150: an ordinary product would divide rows
def test_cpp_makes_the_logits_of_a_head_chunk_by_chunk(
    dtype: torch.dtype, vocabulary: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whispers_kernels.cpp.likeliest import likeliest, likeliest_of
    from whispers_kernels.cpp.linear import PackedLinear

    head = PackedLinear(normal(vocabulary, 70, dtype=dtype), normal(vocabulary))
    hidden = normal(rows, 140, dtype=dtype)[:, :70]
    expected = likeliest(head(hidden, dtype=torch.float32))
    poison(monkeypatch)
    tokens, logprobs = likeliest_of(head, hidden)
    assert torch.equal(tokens, expected[0]) and torch.equal(logprobs, expected[1])
