"""Rows whose final hidden states nobody reads: the last layer computes keys and values of those alone, and nothing else differs."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import Tiny, token_ids
from tests.engine.test_decode import make
from whispers_engine import Engine
from whispers_engine.batch import Span, Work, build_batch
from whispers_kernels import available_impls

PAGE = 8
impls = pytest.mark.parametrize("impl", [impl for impl in ("reference", "cpp") if impl in available_impls()])


def spans(tiny: Tiny) -> list[Work]:
    """A context, a branch that is computed to its end and its option, and one of which a token is left over."""
    context = Span("context", 0, token_ids(tiny, 30, 1), pages=[3, 9, 1, 14])
    ended = Span("branch", 30, token_ids(tiny, 6, 2), parent=context, pages=[4])
    option = Span("branch", 36, token_ids(tiny, 3, 3), parent=ended, pages=[5], scored=True)
    begun = Span("branch", 30, token_ids(tiny, 11, 4), parent=context, pages=[12, 7])
    return [Work(context, 30), Work(ended, 6), Work(option, 3), Work(begun, 10)]


def compute(engine: Engine, work: list[Work], all_wanted: bool) -> tuple[torch.Tensor, dict[Span, int], torch.Tensor]:
    """The hidden states, where each span's last one is, and everything in the pool, which held NaN."""
    model, pool = engine.model, engine.pool
    for store in (pool.k, pool.v):
        store.fill_(torch.nan)
    batch, layout = build_batch(work, pool, model.config.vocab_size, model.device, all_wanted)
    assert (batch.wanted is None) == all_wanted
    return model.forward(batch, pool), layout.last_state, torch.stack((pool.k, pool.v)).nan_to_num(7.0)


@impls
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_left_out_and_nothing_else_differs(tiny: Tiny, impl: str, dtype: str) -> None:
    engine = make(tiny, [], impl=impl, dtype=dtype, page_size=PAGE)
    work = spans(tiny)
    (context, _), (ended, _), (option, _), (begun, _) = work
    every, at, stored = compute(engine, work, all_wanted=True)
    some, last, kept = compute(engine, work, all_wanted=False)
    assert every.shape[0] == 49 and some.shape[0] == 1 + 3
    assert last == {ended: 0, option: 3} and set(at) == {context, ended, option, begun}
    rows = [at[ended], *range(at[option] - 2, at[option] + 1)]
    # A row of the C++ kernels has its own bits in any company; PyTorch's products may be summed otherwise.
    tolerance = 0.0 if impl == "cpp" else 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(some, every[rows], atol=tolerance, rtol=0)
    torch.testing.assert_close(kept, stored, atol=0, rtol=0)


@impls
def test_of_a_context_alone_nothing_comes_back(tiny: Tiny, impl: str) -> None:
    engine = make(tiny, [], impl=impl, page_size=PAGE)
    work = spans(tiny)[:1]
    _, _, stored = compute(engine, work, all_wanted=True)
    none, last, kept = compute(engine, work, all_wanted=False)
    assert none.shape == (0, tiny.hidden) and last == {}
    torch.testing.assert_close(kept, stored, atol=0, rtol=0)


@pytest.mark.skipif("cpp" not in available_impls(), reason="no C++ kernels here")
def test_the_final_states_of_all_rows_are_not_there_then(llama: Tiny) -> None:
    engine = make(llama, [], impl="cpp", page_size=PAGE)
    model = engine.model
    batch, _ = build_batch(spans(llama), engine.pool, model.config.vocab_size, model.device)
    layers = model.config.num_layers
    with pytest.raises(
        ValueError, match=f"taps: {layers}, the final states; accepted with wanted rows: 0 to {layers - 1}"
    ):
        model.forward(batch, engine.pool, {layers: None})
