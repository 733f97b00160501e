"""From a question to token ids: what is context, what is header (docs/semantics.md), and back from ids to text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from .errors import WhispersError

Message: TypeAlias = Mapping[str, str]
# A user turn; chat messages; token ids; or (context ids, header ids).
Question: TypeAlias = str | Sequence[Message] | Sequence[int] | tuple[Sequence[int], Sequence[int]]
_ACCEPTED = "a string, chat messages that end with a user turn, token ids, or (context ids, header ids)"
_MARK = "\ue000"  # for private use: no template writes it
_ENCODED_KEPT = 4


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer. Raises WhispersError where it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises several types of its own
        raise WhispersError(f"{folder}: no tokenizer that transformers can read: {error}") from error
    if not tokenizer.is_fast:
        raise WhispersError(f"{folder}: only a slow tokenizer; accepted: one with a tokenizer.json")
    return tokenizer


def check_text(name: str, text: str) -> None:
    """Raises WhispersError for text that no tokenizer takes: lone surrogates, as in arguments that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WhispersError(f"{name}: the character {text[error.start]!r}; accepted: valid Unicode text") from error


class ChatEncoder:
    """Splits questions into context and header for one base.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocab_size: ids from here on are refused.
        template_kwargs: for the chat template; a thinking switch is off unless they set it.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, template_kwargs: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._encoded: dict[str, Any] = {}
        self._template_kwargs = {"enable_thinking": False, **(template_kwargs or {})}

    @cached_property
    def content_hash(self) -> str:
        """Of all that a question's ids depend on beside its text: the tokenizer, the chat template and its settings."""
        backend = self.tokenizer.backend_tokenizer
        # Not part of any id: tokenizer.json may cut and pad, and transformers sets both anew in every call, here as in `_encode`.
        backend.no_truncation()
        backend.no_padding()
        parts = [backend.to_str(), self.tokenizer.chat_template, self._template_kwargs]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def split(self, question: Question) -> tuple[list[int], list[int]]:
        """Returns `(context ids, header ids)`, neither of them empty, save a context whose only token had to become the header.

        Raises:
            WhispersError: an empty question, messages that do not end with a user turn, text that is no valid Unicode,
                no chat template, ids out of range.
        """
        if isinstance(question, bytes | bytearray | memoryview):
            raise WhispersError(f"question: a {type(question).__name__}; accepted: {_ACCEPTED}")
        if isinstance(question, str):
            if not question.strip():
                raise WhispersError("question: it is empty; accepted: " + _ACCEPTED)
            check_text("question", question)
            context, header = self._split_messages([{"role": "user", "content": question}])
        elif isinstance(question, tuple) and len(question) == 2 and not isinstance(question[0], int | Mapping):
            context, header = self.ids("context ids", question[0]), self.ids("header ids", question[1])
        elif (
            isinstance(question, Sequence) and len(question) > 0 and all(isinstance(part, Mapping) for part in question)
        ):
            context, header = self._split_messages(question)  # type: ignore[arg-type]
        elif isinstance(question, Sequence):
            context, header = self.ids("question", question), []
        else:
            raise WhispersError(f"question: a {type(question).__name__}; accepted: {_ACCEPTED}")
        if not context:
            raise WhispersError("question: its context has no tokens; accepted: " + _ACCEPTED)
        if not header:
            # Otherwise a detached expert, which the context never sees, could not influence the first token.
            context, header = context[:-1], context[-1:]
        return context, header

    def own_tokens(self, question: Question, context: Sequence[int]) -> list[bool]:
        """For each of a context's ids, whether it is part of a user's own words rather than of the template or the system's turn.

        All of them where that cannot be told: token ids, a template that rewrites what it is given. Never none of them.
        """
        everything = [True] * len(context)
        if isinstance(question, str):
            messages: Sequence[Message] = [{"role": "user", "content": question}]
        elif question and all(isinstance(part, Mapping) for part in question):
            messages = question  # type: ignore[assignment]
        else:
            return everything
        text = self._text(messages)
        encoding = self._encode(text)
        spans = self._user_spans(messages, text)
        if encoding.ids[: len(context)] != list(context):
            return everything
        own = [any(begin < last and first < end for begin, end in spans) for first, last in encoding.offsets]
        return own[: len(context)] if any(own[: len(context)]) else everything

    def _user_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where in the rendered text the users' words stand, as character ranges: the template is rendered with a mark in their place."""
        marked = [{**m, "content": _MARK} if m["role"] == "user" else m for m in messages]
        frame = self._text(marked).split(_MARK)
        users = [m["content"] for m in messages if m["role"] == "user"]
        for contents in (users, [content.strip() for content in users]):  # many templates strip
            spans, rendered = [], frame[0]
            for content, after in zip(contents, frame[1:], strict=False):
                spans.append((len(rendered), len(rendered) + len(content)))
                rendered += content + after
            if rendered == text:
                return spans
        return []

    def option(self, option: str | Sequence[int]) -> list[int]:
        """The ids of an option, tokenised alone. Raises WhispersError for one without tokens."""
        if isinstance(option, str):
            ids = self.encode(option)
        else:
            ids = self.ids("option", option)
        if not ids:
            raise WhispersError(f"option {option!r}: it has no tokens; accepted: a string or token ids, not empty")
        return ids

    def encode(self, text: str) -> list[int]:
        """A text's tokens, without special ones.

        Raises:
            WhispersError: text that is no valid Unicode, a token that the base has no embedding for.
        """
        check_text(repr(text), text)
        return self.ids(repr(text), self.tokenizer.encode(text, add_special_tokens=False))

    def end_of_turn(self, eos_ids: Sequence[int]) -> int:
        """The token that ends the assistant's turn: the first one that the template writes after its words, of those that end a generation.

        Args:
            eos_ids: what ends a generation of this base; the first of them where the template tells nothing.

        Raises:
            WhispersError: no such ids.
        """
        if not eos_ids:
            raise WhispersError("answer: this base names no token that ends an answer; accepted: one with eos_token_id")
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
            after = self._text(turns, add_generation_prompt=False).rpartition(_MARK)[2]
            for token in self._encode(after).ids:
                if token in eos_ids:
                    return int(token)
        return eos_ids[0]

    def ids(self, name: str, ids: Any) -> list[int]:
        """Checks token ids."""
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            raise WhispersError(f"{name}: a {type(ids).__name__}; accepted: a list of token ids")
        for value in ids:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self._vocab_size:
                raise WhispersError(f"{name}: the token id {value!r}; accepted: integers in [0, {self._vocab_size})")
        return list(ids)

    def _split_messages(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise WhispersError(f"message {dict(message)!r}; accepted: an object with the strings role and content")
        if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise WhispersError(
                f"messages: the last is {dict(messages[-1])!r}; accepted: a user turn that is not empty"
            )
        if not self.tokenizer.chat_template:
            raise WhispersError(
                "question: this base has no chat template; accepted: token ids, or a base with a chat template"
            )
        with_header = self._render(messages, True)
        without = self._render(messages, False)
        common = next(
            (i for i, (a, b) in enumerate(zip(with_header, without, strict=False)) if a != b),
            min(len(with_header), len(without)),
        )
        return with_header[:common], with_header[common:]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        return self.ids("messages", self._encode(self._text(messages, add_generation_prompt)).ids)

    def _encode(self, text: str) -> Any:
        """A rendered template's ids, and where each stands in the text. The last are kept: a question is looked at more than once."""
        if text not in self._encoded:
            check_text("messages", text)
            while len(self._encoded) >= _ENCODED_KEPT:
                del self._encoded[next(iter(self._encoded))]
            # Through transformers: its backend alone would cut and pad, as tokenizer.json says or as whoever called it last wanted.
            encoding = self.tokenizer(text, add_special_tokens=False, verbose=False)
            self._encoded[text] = encoding.encodings[0]
        return self._encoded[text]

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        return str(self._template(messages, add_generation_prompt))

    def _template(self, messages: Sequence[Message], add_generation_prompt: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._template_kwargs,
            )
        except Exception as error:  # templates raise what they like, jinja2's errors among them
            raise WhispersError(f"messages: the base's chat template refuses them: {error}") from error


class TextStream:
    """A branch's text as its tokens arrive, up to the first stop string.

    `push` returns the text that has become certain: characters whose bytes are complete and that cannot be the beginning of a stop
    string any more. What was handed out is never taken back, even where a later byte changes what the tokenizer would make of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._backend = tokenizer.backend_tokenizer
        self._stop = tuple(stop)
        # Only the latest tokens are decoded again: `_window` are those since the last two places where the text was whole, `_known` is
        # how its beginning, before the newer place, reads.
        self._window: list[int] = []
        self._known_tokens = 0
        self._known = ""
        self._text = ""
        self._sent = 0  # characters already handed out
        self.stopped = False

    @property
    def text(self) -> str:
        return self._text

    def push(self, token: int) -> str:
        if self.stopped:
            return ""
        self._window.append(token)
        read = self._decode(self._window)
        if len(read) > len(self._known) and not read.endswith("\ufffd"):  # else a character's bytes are incomplete
            self._text += read[len(self._known) :]
            self._window = self._window[self._known_tokens :]
            self._known_tokens, self._known = len(self._window), self._decode(self._window)
        if self._cut():
            return self._hand_out(len(self._text))
        held = max((n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)
        return self._hand_out(len(self._text) - held)

    def finish(self) -> str:
        """Hands out what was held back, up to a stop string; bytes that became no character show as they decode."""
        if not self.stopped:
            self._text += self._decode(self._window)[len(self._known) :]
            self._cut()
        return self._hand_out(len(self._text))

    def _cut(self) -> bool:
        """Ends the text before its first stop string; whether it has one."""
        found = [at for at in (self._text.find(stop, max(0, self._sent - len(stop))) for stop in self._stop) if at >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
        return self.stopped

    def _decode(self, tokens: list[int]) -> str:
        return str(self._backend.decode(tokens, skip_special_tokens=True))

    def _hand_out(self, end: int) -> str:
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece
