"""Which examples every expert learns from at a step. The same question for all experts that have it: its context is then read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .examples import Example, Prompt


class Drawn(NamedTuple):
    """An example of one expert, in one order of its options."""

    expert: int
    prompt: Prompt
    shares: tuple[float, ...]


class Sampler:
    """Draws batches; a pure function of the seed and the step.

    Every expert takes the examples that it has seen least, and among those the ones whose questions a draw common to all experts puts
    first. So each goes through all its examples before it sees one again, and experts with the same questions ask them at the same step.

    Args:
        examples: of every expert.
        batch: examples an expert and step; an expert with fewer takes all.
    """

    def __init__(self, examples: Sequence[Sequence[Example]], batch: int, seed: int):
        self._examples = examples
        self._batch = batch
        self._seed = seed
        self._questions = [np.asarray([example.question for example in own]) for own in examples]
        self._count = 1 + max(int(questions.max()) for questions in self._questions)
        self._seen = [np.zeros(len(own), dtype=np.int64) for own in examples]
        self._step = 0

    def skip(self, steps: int) -> None:
        """Draws that many batches and forgets them."""
        for _ in range(steps):
            self._draw()

    def next(self, active: Sequence[bool]) -> list[Drawn]:
        """The next batch, of the experts that are active; whoever shares a context is neighbours."""
        order, chosen = self._draw()
        found = []
        for expert, indices in enumerate(chosen):
            if active[expert]:
                for index in indices:
                    example = self._examples[expert][index]
                    nth = int(order[example.question] * len(example.prompts))
                    found.append((example.question, Drawn(expert, example.prompts[nth], example.shares[nth])))
        found.sort(key=lambda item: (item[0], item[1].prompt.context, item[1].expert))
        return [drawn for _, drawn in found]

    def _draw(self) -> tuple[np.ndarray, list[list[int]]]:
        generator = np.random.default_rng((self._seed, self._step))
        self._step += 1
        priority, order = generator.random(self._count), generator.random(self._count)
        chosen = []
        for questions, seen in zip(self._questions, self._seen, strict=True):
            first = np.lexsort((priority[questions], seen))[: self._batch]
            seen[first] += 1
            chosen.append(first.tolist())
        return order, chosen
