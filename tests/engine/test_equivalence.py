"""The engine computes the functions that transformers and PEFT compute: four families, every placement and kind."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.engine.conftest import Tiny, kv_prompt, soft_prompt, token_ids
from tests.engine.oracle import oracle_logprobs
from whispers_engine import Engine, Expert

TOLERANCE = 1e-4
CASES = [
    ("embeddings", "prefix"),
    ("embeddings", "suffix"),
    ("embeddings", "detached"),
    ("kv", "prefix"),
    ("kv", "detached"),
]


def make_expert(tiny: Tiny, kind: str, placement: str, m: int, seed: int = 1) -> Expert:
    maker = soft_prompt if kind == "embeddings" else kv_prompt
    return maker(tiny, m, seed, f"{kind}-{placement}-{m}", placement)


def check(tiny: Tiny, engine: Engine, expert: Expert | None, context: list[int], header: list[int]) -> None:
    """The whole next-token distribution, and the sum over an option of several tokens."""
    names = [] if expert is None else [expert.name]
    every_token = [[token] for token in range(tiny.vocab)]
    option = token_ids(tiny, 5, seed=99)
    got = engine.score((context, header), [*every_token, option], experts=names).logprobs[0]
    want = oracle_logprobs(tiny.hf, expert, context, header, option)
    torch.testing.assert_close(got[:-1], want[0], atol=TOLERANCE, rtol=0)
    total = sum(want[at, token] for at, token in enumerate(option))
    torch.testing.assert_close(got[-1], total, atol=len(option) * TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_base_is_transformers(tiny: Tiny, length: int) -> None:
    engine = Engine(tiny.folder, page_size=8, kv_cache_tokens=2048)
    check(tiny, engine, None, token_ids(tiny, length, seed=length), token_ids(tiny, 3, seed=3))


@pytest.mark.parametrize(("kind", "placement"), CASES)
@pytest.mark.parametrize(("m", "length"), [(1, 9), (5, 30), (16, 8)])
def test_expert_is_its_definition(tiny: Tiny, kind: str, placement: str, m: int, length: int) -> None:
    engine = Engine(tiny.folder, page_size=8, kv_cache_tokens=2048)
    expert = make_expert(tiny, kind, placement, m)
    engine.add_expert(expert)
    check(tiny, engine, expert, token_ids(tiny, length, seed=length), token_ids(tiny, 4, seed=3))


def test_placements_are_different_functions(llama: Tiny, engine: Engine) -> None:
    """Otherwise the tests above could not tell one from another."""
    context, header = token_ids(llama, 20, seed=1), token_ids(llama, 3, seed=2)
    found = {}
    for kind, placement in [*CASES, ("", "")]:
        expert = make_expert(llama, kind, placement, 6) if kind else None
        found[kind, placement] = oracle_logprobs(llama.hf, expert, context, header, [5])[0]
    for (a, one), (b, other) in itertools.combinations(found.items(), 2):
        assert (one - other).abs().max() > 0.1, (a, b)


@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_empty_header_takes_the_last_token(llama: Tiny, engine: Engine, kind: str, placement: str) -> None:
    """Plain token ids: the expert still reaches the first generated token."""
    expert = make_expert(llama, kind, placement, 6)
    engine.add_expert(expert)
    ids = token_ids(llama, 17, seed=5)
    got = engine.score(ids, [[token] for token in range(llama.vocab)], experts=[expert.name]).logprobs[0]
    want = oracle_logprobs(llama.hf, expert, ids[:-1], ids[-1:], [5])[0]
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_greedy_answer_is_transformers_generate(tiny: Tiny) -> None:
    engine = Engine(tiny.folder, page_size=8, kv_cache_tokens=2048)
    context, header = token_ids(tiny, 21, seed=7), token_ids(tiny, 3, seed=8)
    got = engine.ask((context, header), experts=[]).experts[0]
    ids = torch.tensor([context + header])
    out = tiny.hf.generate(ids, max_new_tokens=256, do_sample=False, attention_mask=torch.ones_like(ids))
    assert got.tokens == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("placement", ["prefix", "detached"])
def test_kv_of_a_prompt_is_the_prompt(tiny: Tiny, placement: str) -> None:
    """The keys and values that a soft prompt leaves in the base, made a kv expert, are the same function: rotated by -m, not twice."""
    engine = Engine(tiny.folder, page_size=8, kv_cache_tokens=2048)
    prompt = soft_prompt(tiny, 11, 1, "prompt", placement)
    with torch.no_grad():
        cache = tiny.hf(inputs_embeds=prompt.embeddings[None]).past_key_values
    values = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])
    for expert in (prompt, Expert("kv", values, placement, kind="kv")):
        engine.add_expert(expert)
    got = engine.score(
        (token_ids(tiny, 20, 1), token_ids(tiny, 4, 2)), [[token] for token in range(tiny.vocab)]
    ).logprobs
    torch.testing.assert_close(got[0], got[1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "placement"), [*CASES, ("", "")])
def test_narrow_dtypes_stay_near(llama: Tiny, dtype: torch.dtype, kind: str, placement: str) -> None:
    """Against float32 transformers: within twice what transformers loses itself in that dtype, plus one rounding of the logits."""
    context, header = token_ids(llama, 30, seed=1), token_ids(llama, 4, seed=2)
    engine = Engine(llama.folder, dtype=str(dtype).removeprefix("torch."), page_size=8, kv_cache_tokens=2048)
    expert = make_expert(llama, kind, placement, 6) if kind else None
    if expert is not None:
        engine.add_expert(expert)
    names = [] if expert is None else [expert.name]
    got = engine.score((context, header), [[token] for token in range(llama.vocab)], experts=names).logprobs[0]
    narrow = type(llama.hf).from_pretrained(llama.folder, dtype=dtype, attn_implementation="eager")
    want, peer = (oracle_logprobs(hf, expert, context, header, [5])[0] for hf in (llama.hf, narrow))
    budget = 2 * (peer - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
    assert (got - want).abs().max() <= budget
