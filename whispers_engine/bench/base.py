"""`whispers bench decode`, `prefill`, `throughput`: a real base, ours beside what its users would otherwise run. Checked before timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple, cast

import torch

from whispers_engine.config import DTYPES
from whispers_engine.engine import base_folder, device_of
from whispers_engine.errors import WhispersError

from .committee import Committee
from .contest import OURS, Rounds, Run, compare, hardest, in_turn, share_equal
from .field import Entry, Field, matched, peers_of, random_prompt
from .judge import CHECKED_TOKENS, Judge, Outcomes
from .llamacpp import features
from .measure import Ceilings, ceilings, environment, implementation, rounded
from .peers import Unavailable
from .steps import Decoded, Prompt
from .work import Work

SHAPES = ((1, 512), (8, 512), (1, 2048), (8, 2048), (32, 2048))  # experts, context
CONTEXTS = (512, 2048)
PRIVATE = 16  # tokens of each expert behind the context: soft prompt and header
_ROUND_MS = 3000.0  # a contender whose steps are slow takes fewer of them a round, three at least

Report = dict[str, Any]
Progress = Callable[[str], None]


class Settings(NamedTuple):
    """What is measured, and how.

    Attributes:
        model: folder, hub id or built-in name.
        device, dtype, impl, quantization: as the Engine's.
        vs: names of peers or of their groups; None: all.
        rounds: how often everybody runs.
        steps: decode steps a round.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    impl: str = "auto"
    quantization: str | None = None
    vs: list[str] | None = None
    rounds: int = 5
    steps: int = 8


class _Setup(NamedTuple):
    """One run's participants, and what their numbers are read against."""

    settings: Settings
    ours: Committee
    field: Field
    judge: Judge
    peers: list[str]
    dtype: torch.dtype
    work: Work
    top: Ceilings
    progress: Progress


def run_decode(
    settings: Settings,
    command: str,
    experts: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    progress: Progress = lambda what: None,
) -> Report:
    """Steps of E experts over one shared context of S tokens, 16 private tokens each: forward, logits and the greedy choice of E rows.

    Args:
        experts, contexts: every pair of them; both None: `SHAPES`.

    Raises:
        WhispersError: a size, peer, implementation, dtype or base that cannot be measured.
    """
    shapes = list(SHAPES)
    if experts is not None or contexts is not None:
        shapes = [(e, s) for s, e in product(contexts or CONTEXTS, experts or (1, 8, 32))]
    _check_sizes(settings, "--experts", [e for e, _ in shapes])
    _check_sizes(settings, "--context", [s for _, s in shapes])
    most, room = max(e for e, _ in shapes), PRIVATE + settings.steps + 2
    setup, report = _set_up(settings, command, most, max(s + e * room for e, s in shapes), progress)
    for size, context in shapes:
        report["results"].append(_decode(setup, size, context))
        setup.field.forget()
    for result in report["results"]:
        one = [r for r in report["results"] if r["experts"] == 1 and r["context"] == result["context"]]
        known = one and "ours_ms" in one[0] and "ours_ms" in result
        result["over_one_expert"] = result["ours_ms"] / one[0]["ours_ms"] if known else None
    return _finished(report)


def run_prefill(
    settings: Settings, command: str, contexts: Sequence[int] | None = None, progress: Progress = lambda what: None
) -> Report:
    """A context of S tokens from nothing to the greedy token behind it. Arguments and errors as `run_decode`'s."""
    contexts = list(contexts or CONTEXTS)
    _check_sizes(settings, "--context", contexts, least=2)
    setup, report = _set_up(settings, command, 1, max(contexts) + PRIVATE + settings.steps, progress)
    for context in contexts:
        report["results"].append(_prefill(setup, context))
        setup.field.forget()
    return _finished(report)


def run_throughput(
    settings: Settings,
    command: str,
    experts: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
    progress: Progress = lambda what: None,
) -> Report:
    """Whole answers of E experts from nothing: the context of S tokens, 16 private ones each, and so many new ones each, greedily.

    Arguments and errors as `run_decode`'s.
    """
    _check_sizes(settings, "--experts", experts)
    _check_sizes(settings, "--context", contexts)
    _check_sizes(settings, "--new-tokens", [new_tokens], least=2)
    most = max(experts)
    room = max(contexts) + most * (PRIVATE + new_tokens + 2)
    setup, report = _set_up(settings, command, most, room, progress)
    for context, size in product(contexts, experts):
        report["results"].append(_answer(setup, size, context, new_tokens))
        setup.field.forget()
    return _finished(report)


def _check_sizes(settings: Settings, option: str, sizes: Sequence[int], least: int = 1) -> None:
    if min(sizes) < least:
        raise WhispersError(f"{option} {sorted(set(sizes))}; accepted: integers from {least} on")
    for name, value, accepted in (("--rounds", settings.rounds, 1), ("--steps", settings.steps, 2)):
        if value < accepted:
            raise WhispersError(f"{name} {value}; accepted: an integer from {accepted} on")


def _set_up(
    settings: Settings, command: str, experts: int, positions: int, progress: Progress
) -> tuple[_Setup, Report]:
    peers_of(settings.vs)  # bad names first, before anything is loaded
    device = device_of(settings.device)
    implementation(settings.impl, device)
    if settings.dtype != "auto" and settings.dtype not in DTYPES:
        raise WhispersError(f"--dtype {settings.dtype!r}; accepted: auto, {', '.join(DTYPES)}")
    folder = base_folder(settings.model)
    field = Field(folder, device, progress)
    soft = random_prompt(field.embeddings(), experts, 1).soft
    progress("loading ours")
    ours = Committee(
        folder,
        soft,
        device=settings.device,
        dtype=settings.dtype,
        impl=settings.impl,
        quantization=settings.quantization,
        kv_cache_tokens=positions
        + CHECKED_TOKENS
        + 128 * (experts + 2),  # pages are begun, and not filled, by the context and every branch
        max_num_seqs=max(256, experts),
    )
    model = ours.engine.model
    progress("ceilings")
    top = ceilings(device, model.dtype)
    work = Work(model.config, model.dtype.itemsize, model.weight_bytes)
    report: Report = {
        **environment(device, command),
        "model": settings.model,
        "impl": model.impl,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": settings.quantization,
        "ceilings": {"GB_s": top.GB_s, "GFLOP_s": top.GFLOP_s},
        "results": [],
    }
    try:
        report["llama.cpp"] = features()
    except Unavailable as error:
        report["llama.cpp"] = str(error)
    peers = peers_of(settings.vs, model.dtype)
    judge = Judge(ours, field, model.dtype, settings.quantization is not None)
    return _Setup(settings, ours, field, judge, peers, model.dtype, work, top, progress), report


def _finished(report: Report) -> Report:
    report["ok"] = all(result["ok"] for result in report["results"])
    return cast(Report, rounded(report))


def _decode(setup: _Setup, experts: int, context: int) -> Report:
    """One shape of `run_decode`."""
    settings, ours = setup.settings, setup.ours

    def tell(what: str) -> None:
        setup.progress(f"{experts} experts, {context} tokens: {what}")

    prompt = random_prompt(setup.field.embeddings(), experts, context)
    tell("checking ours")
    result = _head(setup, "decode_step", experts, context, setup.judge.ours_checked(prompt, experts))
    if not result["ok"]:
        return result
    new_tokens = settings.steps + 1
    tell("checking peers")
    entries, result["errors"], left_out = setup.field.entries(setup.peers, prompt, experts, PRIVATE + new_tokens)
    tokens: dict[str, list[list[int]]] = {}
    outcomes = Outcomes()
    took: dict[str, float] = {}  # milliseconds of a step, in the last round

    def run(name: str, decode: Callable[[Prompt, int, int], Decoded]) -> list[float]:
        wanted = max(4, min(new_tokens, 1 + int(_ROUND_MS / took.get(name, 1.0))))
        decoded = decode(prompt, experts, wanted)
        took[name] = statistics.median(decoded.step_ms)
        tokens[name] = decoded.tokens
        outcomes.add(name, decoded.tokens)
        return decoded.step_ms

    decodes = {OURS: ours.decode} | {entry.name: entry.decode for entry in entries}
    runs: dict[str, Run] = {name: partial(run, name, decode) for name, decode in decodes.items()}
    times, failed = _timed(entries, runs, settings.rounds, tell)
    if not setup.judge.outcomes_right(prompt, result, entries, outcomes, times, failed):
        return result
    equal = {entry.name: share_equal(tokens[OURS], tokens[entry.name]) for entry in entries if entry.name in times}
    result |= _figures(
        setup, entries, times, left_out | failed, setup.work.decode(experts, context, PRIVATE + settings.steps / 2)
    )
    result["tokens_equal"] = {entry.peer: equal[entry.name] for entry in entries if entry.name in equal}
    result["tokens_s"] = experts / result["ours_ms"] * 1e3
    held = ours.memory(prompt, experts, new_tokens)
    needed = setup.work.stored + setup.work.position * (context + experts * (PRIVATE + settings.steps))
    return result | {"memory": held | {"needed": needed, "over_needed": held["total"] / needed}}


def _prefill(setup: _Setup, context: int) -> Report:
    """One shape of `run_prefill`."""

    def tell(what: str) -> None:
        setup.progress(f"{context} tokens: {what}")

    prompt = random_prompt(setup.field.embeddings(), 1, context)
    tell("checking ours")
    result = _head(setup, "prefill", 1, context, setup.judge.ours_checked(prompt, 1))
    if not result["ok"]:
        return result
    tell("checking peers")
    entries, result["errors"], left_out = setup.field.entries(setup.peers, prompt, 1, PRIVATE, _ubatches(context))

    outcomes = Outcomes()

    def run(name: str, prefill: Callable[[Sequence[int]], tuple[int, float]]) -> list[float]:
        token, took = prefill(prompt.context)
        outcomes.add(name, [[token]])
        return [took]

    prefills = {OURS: setup.ours.prefill} | {entry.name: entry.prefill for entry in entries}
    runs: dict[str, Run] = {name: partial(run, name, prefill) for name, prefill in prefills.items()}
    times, failed = _timed(entries, runs, setup.settings.rounds, tell)
    if not setup.judge.outcomes_right(prompt, result, entries, outcomes, times, failed):
        return result
    result |= _figures(setup, entries, times, left_out | failed, setup.work.prefill(context))
    return result | {"tokens_s": context / result["ours_ms"] * 1e3}


def _answer(setup: _Setup, experts: int, context: int, new_tokens: int) -> Report:
    """One shape of `run_throughput`."""

    def tell(what: str) -> None:
        setup.progress(f"{experts} experts, {context} tokens: {what}")

    prompt = random_prompt(setup.field.embeddings(), experts, context)
    tell("checking ours")
    result = _head(setup, "answer", experts, context, setup.judge.ours_checked(prompt, experts))
    if not result["ok"]:
        return result
    tell("checking peers")
    entries, result["errors"], left_out = setup.field.entries(
        setup.peers, prompt, experts, PRIVATE + new_tokens, _ubatches(context)
    )
    outcomes = Outcomes()

    def run(name: str, decode: Callable[[Prompt, int, int], Decoded], forget: Callable[[], None]) -> list[float]:
        forget()
        start = time.perf_counter()
        decoded = decode(prompt, experts, new_tokens)
        took = (time.perf_counter() - start) * 1e3
        outcomes.add(name, decoded.tokens)
        return [took]

    runs: dict[str, Run] = {OURS: partial(run, OURS, setup.ours.decode, setup.ours.forget)}
    runs |= {entry.name: partial(run, entry.name, entry.decode, entry.forget) for entry in entries}
    times, failed = _timed(entries, runs, setup.settings.rounds, tell)
    if not setup.judge.outcomes_right(prompt, result, entries, outcomes, times, failed):
        return result
    begun, step = setup.work.prefill(context), setup.work.decode(experts, context, PRIVATE + new_tokens / 2)
    # The first new token costs no step. Private tokens are left out, which keeps the floor below what any implementation needs.
    moved, flops = (first + (new_tokens - 1) * each for first, each in zip(begun, step, strict=True))
    result |= _figures(setup, entries, times, left_out | failed, (moved, flops))
    return result | {"new_tokens": new_tokens, "tokens_s": experts * new_tokens / result["ours_ms"] * 1e3}


def _ubatches(context: int) -> list[int]:
    """What a user of llama.cpp would try for a prefill of so many tokens."""
    return sorted({512, min(2048, -(-context // 512) * 512)})


def _timed(
    entries: list[Entry], runs: dict[str, Run], rounds: int, tell: Progress
) -> tuple[dict[str, Rounds], dict[str, str]]:
    try:
        return in_turn(runs, rounds, tell)
    finally:
        for entry in entries:
            entry.close()


def _head(setup: _Setup, op: str, experts: int, context: int, checked: Report) -> Report:
    dtype = setup.settings.quantization or str(setup.dtype).removeprefix("torch.")
    return {"op": op, "experts": experts, "context": context, "dtype": dtype, "ok": checked["ok"], "check": checked}


def _figures(
    setup: _Setup, entries: list[Entry], times: dict[str, Rounds], left_out: dict[str, str], needed: tuple[float, float]
) -> Report:
    """What the times mean: each peer by its best setting, and the floor that no implementation passes."""
    found = compare(times, {entry.name: (entry.peer, entry.setting) for entry in entries})
    moved, flops = needed
    # The ceiling is bfloat16's where weights are int8: VNNI nominally does twice as many operations.
    counted = flops / 2 if setup.settings.quantization else flops
    floor = setup.top.floor_ms(moved, counted)
    against = matched(setup.dtype, setup.settings.quantization)
    return found | {
        "against": {group: best for group, names in against.items() if (best := hardest(found["peers"], names))},
        "left_out": left_out,
        "bytes": moved,
        "flops": flops,
        "GB_s": moved / found["ours_ms"] * 1e-6,
        "floor_ms": floor,
        "floor_share": floor / found["ours_ms"],
        "limit": setup.top.limit(moved, counted),
    }
