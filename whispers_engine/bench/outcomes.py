"""What contenders answered while they were timed: a run that is fast because it did something else is found out, and not reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Tokens = Sequence[Sequence[int]]  # [E][new tokens]
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
