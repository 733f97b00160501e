"""`compose`: the base writes the final answer, from the question, the experts' answers and their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from .chat import Message, Question
from .errors import WhispersError
from .request import Answer, Done, Event, ExpertAnswer, Failed, Request, Token

_TASK = (
    "Several experts have answered this question, each from their own point of view.\n\nQuestion: {question}\n\n{answers}\n\n"
    "Write one answer to the question that draws on theirs, more on those with more weight. Where they differ, say how. "
    "Give the answer alone; do not mention the experts."
)


def check_composable(request: Request) -> None:
    """Raises WhispersError for a request whose answers the base could not put together."""
    if request.options is not None:
        raise WhispersError(
            "aggregate: 'compose' writes an answer of its own; accepted with options: vote, delegate, mixture, product"
        )
    question = request.question
    if not isinstance(question, str) and not (isinstance(question, Sequence) and hasattr(question[0], "keys")):
        raise WhispersError(
            "question: token ids cannot be quoted to the base; accepted by 'compose': a string or chat messages"
        )


def composition(question: Question, records: Sequence[ExpertAnswer]) -> list[Message]:
    """The messages that ask the base for the final answer: the conversation up to its last turn, and that turn with the answers."""
    history: list[Message] = []
    if isinstance(question, str):
        asked = question
    else:
        *history, last = cast("Sequence[Message]", question)
        asked = last["content"]
    answers = "\n".join(
        f"Expert {number}, weight {record.weight:.0%}: {record.text.strip()}"
        for number, record in enumerate(records, 1)
    )
    return [*history, {"role": "user", "content": _TASK.format(question=asked.strip(), answers=answers)}]


class Relay:
    """Passes the base's events on as the committee's own: its tokens as the pool's, and its end as the committee's answer.

    Args:
        request_id: of the committee's request.
        answer: what the committee has so far: its experts' answers and how they would have voted.
        sink: where the committee's events go.
    """

    def __init__(self, request_id: int, answer: Answer, sink: Callable[[Event], None]):
        self._id = request_id
        self._answer = answer
        self._sink = sink

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token):
            self._sink(replace(event, request_id=self._id, expert=None))
        elif isinstance(event, Failed):
            self._sink(Failed(self._id, event.error))
        elif isinstance(event, Done):
            before, written = self._answer, event.answer
            usage = {name: count + written.usage[name] for name, count in before.usage.items()}
            took = written.timing["total"]
            timing = {**before.timing, "compose": took, "total": before.timing["total"] + took}
            self._sink(Done(self._id, replace(before, text=written.text, usage=usage, timing=timing)))
