"""What an engine computes in: the dtype that a machine suits, float32 where bfloat16 would lose most, and int8 matrices."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import whispers_engine.auto as auto_module
from tests.engine.conftest import Tiny, soft_prompt, token_ids
from whispers_engine import Engine, Request, SamplingParams, Token
from whispers_kernels import available_impls

CHOOSE = auto_module.auto_dtype  # as it is before the tests' own default
needs_cpp = pytest.mark.skipif("cpp" not in available_impls(), reason="needs the C++ kernels")


@needs_cpp
@pytest.mark.parametrize("step, dtype", ((32, torch.bfloat16), (2, torch.bfloat16), (0, torch.float32)))
def test_a_cpu_computes_in_bfloat16_where_it_multiplies_it(
    step: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whispers_kernels import cpp

    monkeypatch.setattr(cpp, "bf16_step", lambda: step)
    for stored in (torch.float32, torch.bfloat16):
        assert CHOOSE(torch.device("cpu"), "cpp", stored) == dtype
        assert CHOOSE(torch.device("cpu"), "reference", stored) == torch.float32
        assert CHOOSE(torch.device("cuda"), "triton", stored) == stored


@needs_cpp
def test_the_residual_stream_and_the_logits_are_float32(llama: Tiny, tmp_path: Path) -> None:
    """Two layers that add 0.75 to 256 each: 257.5, which a bfloat16 stream (it goes by twos there) would never reach."""
    hf = copy.deepcopy(llama.hf)
    for parameter in hf.parameters():
        parameter.data.zero_()
    hf.model.embed_tokens.weight.data.fill_(256)
    for layer in hf.model.layers:
        layer.mlp.down_proj.bias.data.fill_(0.75)
    hf.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    engine = Engine(tmp_path, impl="cpp", dtype="bfloat16")
    (states,) = engine.read_tokens(["Whose turn is it?"], 2)
    assert states.unique().tolist() == [258]  # 257.5, rounded for the reader
    assert engine.model.logits(torch.ones(2, llama.hidden, dtype=torch.bfloat16)).dtype == torch.float32


@needs_cpp
def test_int8_is_near_and_smaller(tiny: Tiny) -> None:
    """Near is what its rounding can move, and far enough to show that it does."""
    plain = Engine(tiny.folder, impl="cpp")
    small = Engine(tiny.folder, impl="cpp", quantization="int8")
    assert small.model.weight_bytes < 0.9 * plain.model.weight_bytes
    context, options = (token_ids(tiny, 40, 1), token_ids(tiny, 3, 2)), [[5], [9, 11], [20], [31, 8, 4]]
    moved = []
    for engine in (plain, small):
        engine.add_expert(soft_prompt(tiny, 5, 3, "one", "suffix"))
        moved.append(engine.score(context, options, experts=["one"]).logprobs)
    change = (torch.as_tensor(moved[0]).softmax(-1) - torch.as_tensor(moved[1]).softmax(-1)).abs()
    assert 0 < float(change.max()) < 0.05


@needs_cpp
def test_int8_has_the_same_bits_in_any_company(tiny: Tiny) -> None:
    def answers(names: list[str]) -> dict[str | None, list[tuple[int, float]]]:
        engine = Engine(tiny.folder, impl="cpp", quantization="int8", page_size=8)
        for index, name in enumerate(("one", "two", "three")):
            engine.add_expert(soft_prompt(tiny, 4 + index, index, name, "suffix"))
        context = (token_ids(tiny, 50, 1), token_ids(tiny, 3, 2))
        engine.submit(Request(context, experts=names, sampling=SamplingParams(max_tokens=9), early_end=False))
        found: dict[str | None, list[tuple[int, float]]] = {}
        while engine.busy:
            for event in engine.step():
                if isinstance(event, Token):
                    found.setdefault(event.expert, []).append((event.token, event.logprob))
        return found

    together = answers(["one", "two", "three"])
    for name in ("one", "two", "three"):
        assert answers([name])[name] == together[name]
