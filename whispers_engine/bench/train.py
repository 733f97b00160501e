"""`whispers bench train`: soft prompts trained by ours and by PEFT with transformers' Trainer: same base, data, dtype, batch, steps."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whispers_engine.engine import base_folder
from whispers_engine.errors import WhispersError
from whispers_engine.training.base import Base
from whispers_engine.training.contexts import ContextStore
from whispers_engine.training.examples import Example, Prompt
from whispers_engine.training.optimizer import AdamW, rate_factor
from whispers_engine.training.sampler import Sampler
from whispers_engine.training.step import Stepper

from .contest import OURS, Rounds, compare, in_turn
from .measure import environment, rounded
from .peft_trainer import PeftTrainer, Text
from .train_check import check_gradient

CONTEXTS = (100, 400)
PLACEMENTS = ("suffix", "detached")
PEER = "peft-trainer"
TARGETS = {100: 5.0, 400: 12.0}  # what docs/training.md promises
_HEADER = 3
_VIRTUAL = 16
_RATE = 0.01
_MEMORY = 8 << 30

Report = dict[str, Any]
Progress = Callable[[str], None]


class Settings(NamedTuple):
    """What is measured, and how.

    Attributes:
        model, device, dtype: as `Base.load`'s.
        answer: tokens of an answer, the end of turn among them.
        batch: examples an expert and step.
        steps: a round.
        rounds: how often everybody runs.
        experts: of the run of several at once.
        examples: of every expert, an epoch.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    answer: int = 2
    batch: int = 8
    steps: int = 4
    rounds: int = 3
    experts: int = 8
    examples: int = 32


def run_train(
    settings: Settings, command: str, contexts: Sequence[int] | None = None, progress: Progress = lambda what: None
) -> Report:
    """Steps over warm contexts, ours for each placement and the peer's, in turn; then the cold first epoch and several experts at once.

    Raises:
        WhispersError: a size, dtype or base that cannot be measured, or a package of the peer's that is not here.
    """
    contexts = list(contexts or CONTEXTS)
    for name, number in (("--context", min(contexts)), *zip(_SIZES, settings[3:], strict=True)):
        if number < 1:
            raise WhispersError(f"{name} {number}; accepted: integers from 1 on")
    missing = [package for package in ("peft", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise WhispersError(f"bench train: without {' and '.join(missing)}; accepted: pip install '.[bench]'")
    progress("loading ours")
    base = Base.load(settings.model, settings.device, settings.dtype)
    report: Report = {**settings._asdict(), **environment(base.device, command)}
    report |= {"dtype": str(base.dtype).removeprefix("torch."), "ok": True, "results": []}
    for length in contexts:
        for result in _measure(base, settings, length, progress):
            report["ok"] = report["ok"] and result["ok"]
            report["results"].append(result)
    return dict(rounded(report))


_SIZES = ("--answer", "--batch", "--steps", "--rounds", "--experts", "--examples")


class Ours:
    """The trainer's own step, over examples whose contexts are kept."""

    def __init__(self, base: Base, examples: Sequence[Sequence[Example]], soft: Tensor, placement: str, batch: int):
        self._base = base
        self._examples = examples
        self._batch = batch
        self._soft = soft.to(base.device)
        self._placement = placement
        self.forget()

    def forget(self) -> None:
        """Back to the beginning, no context computed."""
        self.store = ContextStore(self._base, _MEMORY)
        self.stepper = Stepper(self._base, self.store, self._placement, "embeddings", self._soft.shape[1], None)
        self._sampler = Sampler(self._examples, self._batch, seed=0)
        self._optimizer = AdamW(self._soft.clone(), 0.0, 1.0)
        self._active = torch.ones(len(self._soft), dtype=torch.bool, device=self._base.device)

    def warm(self) -> None:
        for own in self._examples:
            for example in own:
                self.store.get(example.prompts[0].context)

    def run(self, steps: int) -> list[float]:
        """Milliseconds of each of so many steps."""
        times = []
        for step in range(steps):
            start = time.perf_counter()
            drawn = self._sampler.next([True] * len(self._soft))
            _, gradient = self.stepper.gradient(self._optimizer.value, drawn)
            self._optimizer.step(gradient, _RATE * rate_factor(step, steps, 0.0, "linear"), step, self._active)
            if self._base.device.type == "cuda":
                torch.cuda.synchronize(self._base.device)
            times.append((time.perf_counter() - start) * 1e3)
        return times


def _measure(base: Base, settings: Settings, length: int, progress: Progress) -> list[Report]:
    texts = _texts(base, settings, length)
    soft = base.weights.embeddings[_ids(base, settings.experts * _VIRTUAL, seed=1)].float()
    soft = soft.view(settings.experts, _VIRTUAL, -1)
    examples = [_example(number, text) for number, text in enumerate(texts)]
    progress(f"{length} tokens: loading {PEER}")
    peer = PeftTrainer(base_folder(base.name), base.dtype, base.device, texts, soft[0].cpu(), settings.batch, _RATE)
    one = {place: Ours(base, [examples], soft[:1], place, settings.batch) for place in PLACEMENTS}
    all_ = {place: Ours(base, [examples] * settings.experts, soft, place, settings.batch) for place in PLACEMENTS}
    progress(f"{length} tokens: checking ours")
    checked = {place: _checked(base, one[place], all_[place], examples, soft, place) for place in PLACEMENTS}
    if not all(found["ok"] for found in checked.values()):  # nothing is timed beside what is wrong
        return [_head(settings, length, place, checked[place]) for place in PLACEMENTS]
    runs: dict[str, Callable[[], list[float]]] = {}
    cold = {}
    for place in PLACEMENTS:
        progress(f"{length} tokens: {place}, the cold first epoch")
        epoch = -(-settings.examples // settings.batch)
        one[place].forget()
        cold[place] = sum(one[place].run(epoch)) / epoch
        one[place].warm()
        all_[place].warm()
        runs[place] = lambda ours=one[place]: ours.run(settings.steps)  # type: ignore[misc]
        runs[f"{place} x{settings.experts}"] = lambda ours=all_[place]: ours.run(settings.steps)  # type: ignore[misc]
    runs[PEER] = lambda: peer.run(settings.steps)
    times, failed = in_turn(runs, settings.rounds, lambda what: progress(f"{length} tokens: {what}"))
    if failed:
        raise WhispersError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    return [_result(settings, length, place, times, cold[place], checked[place]) for place in PLACEMENTS]


def _checked(
    base: Base, one: Ours, all_: Ours, examples: Sequence[Example], soft: Tensor, place: str
) -> dict[str, Any]:
    """The gradients of both runs: of one expert over two examples, and of all, each over an example of its own as far as there are."""
    each = [[examples[index % len(examples)]] for index in range(len(soft))]
    alone = check_gradient(base, one.stepper, soft[:1], [examples[:2]], place)
    together = check_gradient(base, all_.stepper, soft, each, place)
    return {**alone, "ok": alone["ok"] and together["ok"], "together": together}


def _head(settings: Settings, length: int, place: str, checked: dict[str, Any]) -> Report:
    ok = checked["ok"]
    return {
        "op": "train_step",
        "placement": place,
        "context": length,
        "answer": settings.answer,
        "ok": ok,
        "check": checked,
    }


def _result(
    settings: Settings, length: int, place: str, times: dict[str, Rounds], cold_ms: float, checked: Report
) -> Report:
    found = compare({OURS: times[place], PEER: times[PEER]})
    together = statistics.median(step for steps in times[f"{place} x{settings.experts}"] for step in steps)
    ours, theirs = found["ours_ms"], found["peers"][PEER]["ms"]
    return {
        **_head(settings, length, place, checked),
        **found,
        "examples_s": {"ours": settings.batch / ours * 1e3, PEER: settings.batch / theirs * 1e3},
        "target": TARGETS.get(length),
        "cold": {"ms": cold_ms, "examples_s": settings.batch / cold_ms * 1e3, "ratio": theirs / cold_ms},
        "together": {
            "experts": settings.experts,
            "ms": together,
            "examples_s": settings.experts * settings.batch / together * 1e3,
            "over_in_turn": settings.experts * ours / together,
            "ratio": settings.experts * theirs / together,
        },
    }


def _ids(base: Base, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # The last ids of many vocabularies are special ones, the first too.
    return torch.randint(base.config.vocab_size // 8, base.config.vocab_size // 2, (count,), generator=generator)


def _texts(base: Base, settings: Settings, length: int) -> list[Text]:
    """Random tokens, all of one length: what is padded would only cost the peer."""
    size = length + _HEADER + settings.answer
    header = _ids(base, _HEADER, seed=2).tolist()
    rows = _ids(base, settings.examples * size, seed=3).view(settings.examples, size).tolist()
    return [Text(row[:length], header, row[length + _HEADER :]) for row in rows]


def _example(number: int, text: Text) -> Example:
    prompt = Prompt(tuple(text.context), tuple(text.header), (tuple(text.answer),), compete=False)
    return Example(number, (prompt,), ((1.0,),))
