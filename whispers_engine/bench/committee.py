"""Ours as a contender: the engine as its users run it, with one `suffix` expert for every soft prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from whispers_engine.engine import Engine
from whispers_engine.experts import Expert
from whispers_engine.request import Event, Request, Token
from whispers_engine.sampling import SamplingParams

from .steps import Decoded, Prompt, greedy, timed


class Committee:
    """An engine whose branches run to their last token, whatever it is.

    Args:
        model: the base's folder or name.
        soft: `[E, m, hidden]`, the experts.
        settings: of the Engine.
    """

    def __init__(self, model: str | Path, soft: Tensor, **settings: Any):
        self.engine = Engine(model, **settings)
        # Peers go on behind an end token too: a step is a step of all branches.
        self.engine.model.config = replace(self.engine.model.config, eos_ids=())
        self._names = [f"expert-{index}" for index in range(soft.shape[0])]
        for name, embeddings in zip(self._names, soft, strict=True):
            self.engine.add_expert(Expert(name, embeddings))

    def decode(self, prompt: Prompt, experts: int, new_tokens: int) -> Decoded:
        """Answers the prompt with the first so many experts, greedily."""
        names = self._names[:experts]
        self.engine.submit(greedy(prompt, names, new_tokens))
        return timed(self.engine.step, names, new_tokens)

    def forget(self) -> None:
        """Begins the next run from nothing."""
        self.engine.pool.forget()

    def prefill(self, ids: Sequence[int]) -> tuple[int, float]:
        """The greedy token of the base behind these, nothing of them being known, and the milliseconds that it took."""
        self.forget()
        question = (list(ids[:-1]), list(ids[-1:]))
        request = Request(question, experts=[], sampling=SamplingParams(max_tokens=1), early_end=False)
        events: list[Event] = []
        start = time.perf_counter()
        self.engine.submit(request)
        while self.engine.busy:
            events += self.engine.step()
        took = (time.perf_counter() - start) * 1e3
        (token,) = (event.token for event in events if isinstance(event, Token))
        return token, took

    def memory(self, prompt: Prompt, experts: int, new_tokens: int) -> dict[str, int]:
        """Bytes that a committee's answer holds at most: the weights, pages of the context, pages of the branches."""
        names, pool = self._names[:experts], self.engine.pool
        page = (pool.k.nbytes + pool.v.nbytes) // pool.num_pages
        most = {"pages_context": 0, "pages_branch": 0}

        def step() -> list[Event]:
            events = self.engine.step()
            stats = self.engine.cache_stats()
            for name in most:
                most[name] = max(most[name], stats[name])
            return events

        self.engine.submit(greedy(prompt, names, new_tokens))
        timed(step, names, new_tokens)
        weights = self.engine.model.weight_bytes
        context, private = (most[name] * page for name in ("pages_context", "pages_branch"))
        return {"weights": weights, "context": context, "private": private, "total": weights + context + private}
