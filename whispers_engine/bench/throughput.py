"""`whispers bench throughput`: a committee's decode step on a whole random Llama, beside transformers on the same device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch

from whispers_engine.errors import WhispersError

from .check import judge_tokens
from .contest import OURS, in_turn, share_equal
from .hf import SHORT, Transformers
from .llama import SHAPES, LlamaShape, as_dtype, random_weights, transformers_model, weight_bytes
from .measure import Ceilings, Timing, ceilings, environment, implementation, rounded, summary
from .steps import SOFT_TOKENS, Decoded, Prompt, Rig

PEERS = {"transformers": "dynamic", "transformers-static": "static", "transformers-compiled": "compiled"}
_ROUNDS = 2  # of all steps, alternately
_CHECKED = (3, 100, 12)  # experts, context, new tokens: three experts over more than one page

Report = dict[str, Any]


def run_throughput(
    device: torch.device,
    dtype: torch.dtype,
    command: str,
    *,
    shape: str,
    experts: Sequence[int] = (1, 8),
    context: int = 2048,
    new_tokens: int = 64,
    impl: str = "auto",
    peers: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Checks two layers against transformers, then measures the whole model; returns the report that `--json` prints.

    Args:
        shape: a name of `SHAPES`.
        experts: committees' sizes.
        new_tokens: tokens each branch generates; every one but the first is a step that is timed.
        peers: names of `PEERS`; None: all, the compiled one on a GPU only.

    Raises:
        WhispersError: a shape, implementation or peer that is not there, or a size that is too small.
    """
    if shape not in SHAPES:
        raise WhispersError(f"--shape {shape!r}; accepted: {', '.join(SHAPES)}")
    if peers is None:
        peers = [name for name in PEERS if name != "transformers-compiled" or device.type == "cuda"]
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise WhispersError(f"--peers: {', '.join(unknown)}; accepted: {', '.join(PEERS)}")
    if not experts or min(*experts, context) < 1 or new_tokens < 3:
        raise WhispersError(
            f"--experts {list(experts)}, --context {context}, --new-tokens {new_tokens}; accepted: at least 1, 1 and 3"
        )
    impl = implementation(impl, device)
    llama = SHAPES[shape]
    progress("checking two layers against transformers")
    checked = check(llama, dtype, device, impl)
    report: Report = {**environment(device, command), "impl": impl, "check": checked, "results": []}
    report["ok"] = checked["ok"]
    if not checked["ok"]:
        return cast(Report, rounded(report))
    gc.collect()
    progress("ceilings")
    top = ceilings(device, dtype)
    report["ceilings"] = {"GB_s": top.GB_s, "GFLOP_s": top.GFLOP_s}
    report["results"] = _measure(llama, dtype, device, impl, experts, context, new_tokens, peers, top, progress)
    for result in report["results"]:
        result |= {"shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    return cast(Report, rounded(report))


def check(shape: LlamaShape, dtype: torch.dtype, device: torch.device, impl: str) -> Report:
    """Two layers of the shape: the tokens that the engine generates, as likely as transformers finds them in float32."""
    experts, context, new_tokens = _CHECKED
    shallow = shape.shallow()
    weights = random_weights(shallow, dtype, device, seed=1)
    prompt = Prompt.random(shallow, weights, experts, context, seed=1)
    ours = Rig(shallow, weights, prompt, new_tokens, impl).decode(experts, new_tokens)
    exact, plain = (
        Transformers(transformers_model(shallow, these)).logprobs(prompt, ours.tokens)
        for these in (as_dtype(weights, torch.float32), weights)
    )
    return {"layers": shallow.layers, **judge_tokens(ours.tokens, ours.logprobs, exact, plain, dtype)}


def _measure(
    shape: LlamaShape,
    dtype: torch.dtype,
    device: torch.device,
    impl: str,
    experts: Sequence[int],
    context: int,
    new_tokens: int,
    peers: Sequence[str],
    top: Ceilings,
    progress: Callable[[str], None],
) -> list[Report]:
    weights = random_weights(shape, dtype, device)
    prompt = Prompt.random(shape, weights, max(experts), context)
    length = len(prompt.context) + SOFT_TOKENS + len(prompt.header) + new_tokens
    rig = Rig(shape, weights, prompt, new_tokens, impl)
    runs: dict[str, Callable[[int, int], Decoded]] = {OURS: rig.decode}
    for name in peers:
        model = Transformers(transformers_model(shape, weights), PEERS[name], length)
        runs[f"{name}-{SHORT[dtype]}"] = partial(model.decode, prompt)
    results: list[Report] = []
    for size in experts:
        times, left_out, equal = _alternate(runs, size, new_tokens, progress)
        moved = weight_bytes(weights) + _cache_bytes(shape, dtype, context + size * prompt.branch_keys(new_tokens))
        floor = top.floor_ms(moved)
        ours = times.pop(OURS)
        results.append(
            {
                "op": "decode_step",
                "experts": size,
                "context": context,
                "new_tokens": new_tokens,
                "ok": True,
                "ours_ms": ours.ms,
                "spread": ours.spread,
                "tokens_s": size / ours.ms * 1e3,
                "peers": {
                    name: {"ms": time.ms, "ratio": time.ms / ours.ms, "tokens_s": size / time.ms * 1e3}
                    for name, time in times.items()
                },
                "left_out": left_out,
                "tokens_equal": equal,
                "bytes": moved,
                "GB_s": moved / ours.ms * 1e-6,
                "floor_ms": floor,
                "floor_share": floor / ours.ms,
            }
        )
    one = next((result["ours_ms"] for result in results if result["experts"] == 1), None)
    for result in results:
        result["over_one_expert"] = None if one is None else result["ours_ms"] / one
    return results


def _alternate(
    runs: dict[str, Callable[[int, int], Decoded]], experts: int, new_tokens: int, progress: Callable[[str], None]
) -> tuple[dict[str, Timing], dict[str, str], dict[str, float]]:
    """All contenders in turn: times, those that failed and why, and the share of tokens on which each peer agrees with us."""
    tokens: dict[str, list[list[int]]] = {}

    def steps(name: str) -> list[float]:
        decoded = runs[name](experts, new_tokens)
        tokens[name] = decoded.tokens
        return decoded.step_ms

    times, left_out = in_turn(
        {name: partial(steps, name) for name in runs}, _ROUNDS, lambda what: progress(f"{experts} experts, {what}")
    )
    equal = {name: share_equal(tokens[OURS], tokens[name]) for name in times if name != OURS}
    return {name: summary(list(chain(*rounds)), "clock") for name, rounds in times.items()}, left_out, equal


def _cache_bytes(shape: LlamaShape, dtype: torch.dtype, keys: float) -> float:
    return 2 * shape.layers * shape.kv_heads * shape.dim * dtype.itemsize * keys
