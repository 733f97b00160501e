"""Everything that the base computes: option log-probabilities, router features, latencies. What the store has is not computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from whispers_engine.chat import Question
from whispers_engine.errors import WhispersError
from whispers_engine.reading import Reader
from whispers_engine.request import Request
from whispers_engine.router import profile_text

from .cast import BASE
from .store import Logprobs, Store

if TYPE_CHECKING:
    from whispers_engine.engine import Engine

PROFILE = "country"  # what a router's profile calls the culture
_AT_ONCE = 16  # questions read and then scored: their contexts are still there
_BRANCHES = 32  # experts in one request: what they take of the page pool at once is bounded
Progress = Callable[[str, int], None]  # what is done now, and how many units more are


def instructions(culture: str, prompt: str) -> dict[str, Question]:
    """The prompts for the base that is told in words whom to answer as, by their rows' keys: before the question, or as the system's turn
    in place of the template's own."""
    words = f"Answer as someone from {culture}."
    turns = [{"role": "system", "content": words}, {"role": "user", "content": prompt}]
    return {"instruction": f"{words}\n\n{prompt}", "instruction-system": turns}


def ways_to_tell(engine: Engine) -> list[str]:
    """The instructions that the base's chat template takes: not every one has a system's turn."""
    ways = []
    for key, question in instructions("X", "x").items():
        with contextlib.suppress(WhispersError):
            engine.chat.split(question)
            ways.append(key)
    return ways


@dataclass(frozen=True)
class Job:
    """A prompt whose options are to be scored.

    Attributes:
        where: the record it is from, for messages.
        experts: their keys (`cast.expert_key`, or BASE).
    """

    where: str
    prompt: Question
    options: tuple[str, ...]
    experts: tuple[str, ...]


class Computer:
    """Computes and keeps.

    Args:
        names: an engine's names for experts, by key (`Cast.engage`).
        store: open for appending while `run` and the others compute.
    """

    def __init__(self, engine: Engine, names: Mapping[str, str], store: Store):
        self.engine = engine
        self.store = store
        self._names = names
        self._keys = {name: key for key, name in names.items()}

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuses what this engine cannot score (too long a question, say) before anything is computed."""
        for job in jobs:
            asked = list(self._requests(job.experts))
            try:
                for names in asked:
                    self.engine.stream(job.prompt, job.options, names)  # refused now; work starts with its first event
            except WhispersError as error:
                raise WhispersError(f"{job.where}: {error}") from error

    def run(self, jobs: Sequence[Job], what: str, progress: Progress) -> None:
        """Scores jobs, some at a time: their contexts are still there when more experts are asked."""
        for first in range(0, len(jobs), _AT_ONCE):
            self._score(jobs[first : first + _AT_ONCE], what, progress)

    def _score(self, jobs: Sequence[Job], what: str, progress: Progress) -> None:
        asked = [list(self._requests(self.store.missing(self.key(job), job.experts))) for job in jobs]
        # A job's second request after every job's first: it finds the context that the first has computed.
        turns = max(map(len, asked), default=0)
        requests = [
            (at, Request(jobs[at].prompt, jobs[at].options, names[turn]))
            for turn in range(turns)
            for at, names in enumerate(asked)
            if turn < len(names)
        ]
        left = list(map(len, asked))
        progress(what, left.count(0))
        results = self.engine.score_many(request for _, request in requests)
        for (at, _), result in zip(requests, results, strict=True):
            rows: list[Logprobs] = list(result.logprobs.numpy())
            found = {self._keys[name]: row for name, row in zip(result.experts, rows, strict=True)}
            self.store.add_logprobs(self.key(jobs[at]), found)
            left[at] -= 1
            progress(what, int(left[at] == 0))

    def _requests(self, experts: Sequence[str]) -> Iterator[list[str]]:
        """Lists of names to ask for; the base is asked by naming nobody."""
        if BASE in experts:
            yield []
        named = [self._names[key] for key in dict.fromkeys(experts) if key != BASE]
        for first in range(0, len(named), _BRANCHES):
            yield named[first : first + _BRANCHES]

    def key(self, job: Job) -> str:
        return self.store.key(job.prompt, job.options)

    # --- what routers read -----------------------------------------------------------------------------------------------------

    def read(
        self, texts: Sequence[str], reader: Reader, progress: Progress = lambda what, units: None, what: str = ""
    ) -> None:
        """Reads the features of texts that have none yet."""
        todo = [text for text in dict.fromkeys(texts) if self.store.feature(self.store.key(text), reader.key) is None]
        progress(what, len(texts) - len(todo))
        for first in range(0, len(todo), _AT_ONCE):
            some = todo[first : first + _AT_ONCE]
            for text, values in zip(some, self.engine.read(some, reader), strict=True):
                self.store.add_feature(self.store.key(text), reader.key, values.numpy())
            progress(what, len(some))

    def feature(self, text: str, reader: Reader) -> np.ndarray:
        """float32 `[width]`, of a text that has been read."""
        found = self.store.feature(self.store.key(text), reader.key)
        assert found is not None
        return found

    # --- latency ---------------------------------------------------------------------------------------------------------------

    def time(self, groups: Sequence[Sequence[Job]], what: str, progress: Progress) -> list[list[float]]:
        """Seconds that each job takes alone, from submission to answer, nothing of it in the page pool. Kept as all else is: a rerun
        says what was measured first.

        Args:
            groups: to be compared, of equally many jobs. Each asks its first job once unmeasured, so that none pays for warming up; then
                they take turns, question by question, so that a machine that becomes slower does so for all.
        """
        # All together: what was measured on another day, or in another order, is not to be compared.
        key = self.store.key("seconds in turn", [[(self.key(job), job.experts) for job in jobs] for jobs in groups])
        found = self.store.seconds(key)
        if found is None:
            for jobs in groups:
                self._time_alone(jobs[0])
            found = []
            for turn in zip(*groups, strict=True):
                for job in turn:
                    found.append(self._time_alone(job))
                    progress(what, 1)
            self.store.add_seconds(key, found)
        else:
            progress(what, len(found))
        return [found[at :: len(groups)] for at in range(len(groups))]

    def _time_alone(self, job: Job) -> float:
        self.engine.pool.forget()
        named = [self._names[expert] for expert in dict.fromkeys(job.experts) if expert != BASE]
        return self.engine.ask(job.prompt, job.options, named).timing["total"]


def profile_of(culture: str) -> str:
    """What a router reads of a profile that names the culture."""
    return profile_text({PROFILE: culture})
