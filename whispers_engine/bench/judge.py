"""Whether ours may be timed, and whether what was timed did what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from .check import by_how_much, judge_tokens
from .committee import Committee
from .contest import OURS, Rounds
from .field import Entry, Field
from .hf import Transformers
from .steps import Prompt

Tokens = Sequence[Sequence[int]]  # [E][new tokens]
CHECKED_TOKENS = 32  # of all experts, at least: a mean of fewer says little
_CHECKED_STEPS = 4  # at least
_JUDGED = 32  # tokens of an expert; the distributions of a committee of 32 take 200 MB


class Outcomes:
    """By contender, the different tokens that its runs gave: one list, mostly, since greedy runs of one prompt agree."""

    def __init__(self) -> None:
        self._of: dict[str, list[Tokens]] = {}

    def add(self, name: str, tokens: Tokens) -> None:
        """What one run gave. A shorter run's tokens are the beginning of a longer one's: they say nothing new."""
        tokens = [row[:_JUDGED] for row in tokens]
        known = self._of.setdefault(name, [])
        if not any(_begins(tokens, other) for other in known):
            known[:] = [other for other in known if not _begins(other, tokens)] + [tokens]

    def worst(self, name: str, passed_over: Callable[[Tokens], float]) -> float:
        """The largest of what `passed_over` says of a contender's runs."""
        return max(map(passed_over, self._of[name]))


def _begins(short: Tokens, long: Tokens) -> bool:
    return all(list(one) == list(other[: len(one)]) for one, other in zip(short, long, strict=True))


class Judge(NamedTuple):
    """Holds everybody to the base as transformers computes it in float32; ours in int8 to what its own weights say.

    Attributes:
        dtype: ours; of int8 weights, the dtype that they were rounded from.
    """

    ours: Committee
    field: Field
    dtype: torch.dtype
    int8: bool

    def ours_checked(self, prompt: Prompt, experts: int) -> dict[str, Any]:
        """Ours before it is timed, on the tokens that it chooses: as `judge_tokens` returns it."""
        steps = max(_CHECKED_STEPS, -(-CHECKED_TOKENS // experts))
        decoded = self.ours.decode(prompt, experts, steps)
        exact = self.field.transformers(torch.float32).logprobs(prompt, decoded.tokens)
        half = torch.bfloat16 if self.int8 else self.dtype
        plain = exact if half == torch.float32 else self.field.transformers(half).logprobs(prompt, decoded.tokens)
        own = None
        if self.int8:  # what its weights lose is `benchmarks/int8_loss.py`'s; here ours must compute what they say
            own = self._truth.logprobs(prompt, decoded.tokens)
            self._truth.forget()  # a third cache of a large committee
        return judge_tokens(decoded.tokens, decoded.logprobs, exact, plain, half, own)

    def outcomes_right(
        self,
        prompt: Prompt,
        result: dict[str, Any],
        entries: list[Entry],
        outcomes: Outcomes,
        times: dict[str, Rounds],
        failed: dict[str, str],
    ) -> bool:
        """Judges what everybody answered while it was timed. A peer that passed too much over leaves `times` for `failed`; where ours
        did, `result` says so, and there is nothing to report."""

        def passed_over(model: Transformers, tokens: Tokens) -> float:
            if result["op"] == "prefill":
                return by_how_much(model.behind(prompt.context)[None, None], tokens)
            return by_how_much(model.logprobs(prompt, tokens), tokens)

        ours = outcomes.worst(OURS, partial(passed_over, self._truth))
        checked = result["check"]
        checked["passed_over_timed"] = ours
        if not ours <= 2 * checked["budget"]:
            result["ok"] = checked["ok"] = False
            return False
        plain = self.field.transformers(torch.float32)
        for entry in entries:
            if entry.name in times:
                budget = result["errors"][entry.peer]["budget"]
                worst = outcomes.worst(entry.name, partial(passed_over, plain))
                if not worst <= budget:
                    del times[entry.name]
                    failed[entry.name] = f"wrong while it was timed: passed over {worst:.1e}, budget {budget:.1e}"
        return True

    @property
    def _truth(self) -> Transformers:
        """Of what ours computes."""
        return self.field.transformers(torch.float32, self.dtype if self.int8 else None)
