"""From records to examples: for every culture the prompts it is asked and what it should answer; whatever is refused is refused here."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..chat import ChatEncoder
from ..config import ModelConfig
from ..errors import WhispersError
from ..experts import check_name
from ..records import ChoiceRecord, Record, RecordFile, ShareRecord, TextRecord, prompt


class Prompt(NamedTuple):
    """A record as token ids.

    Attributes:
        options: of competing options, all; of a free answer, that alone with its end of turn.
        compete: only the options' shares among themselves matter.
    """

    context: tuple[int, ...]
    header: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    compete: bool

    @property
    def tokens(self) -> int:
        """Of the longest answer, with all that stands before it."""
        return len(self.context) + len(self.header) + max(map(len, self.options))


class Example(NamedTuple):
    """What one culture answers to one record.

    Attributes:
        question: number of the question's text in the file; records that ask the same have the same.
        prompts: one for every order of the options that is trained on; the first lists them as the record does.
        shares: for each order, what the options' shares should be; of a free answer (1,).
    """

    question: int
    prompts: tuple[Prompt, ...]
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Culture:
    """The examples of one culture, split by question."""

    name: str  # as the data has it
    expert: str  # what its expert will be called
    train: tuple[Example, ...]
    dev: tuple[Example, ...]


def build_cultures(
    source: RecordFile,
    chat: ChatEncoder,
    config: ModelConfig,
    *,
    wanted: Sequence[str] | None,
    virtual_tokens: int,
    dev_share: float,
    orders: int = 1,
    seed: int = 0,
) -> list[Culture]:
    """Every culture's examples.

    Args:
        wanted: cultures or the names of their experts, in this order; None: all, in the order of the file.
        virtual_tokens: that must fit beside a prompt.
        dev_share: the share of the questions that is held out; which ones, a hash of their text decides.
        orders: of listed options, how many different ones.

    Raises:
        WhispersError: a culture that is wanted and has no example, two cultures whose experts would have one name, an answer that the
            model does not take after its question; names file and line where there is one.
    """
    found = _by_culture(source)
    chosen = _chosen(source, list(found), wanted)
    encoder = _Encoder(source, chat, config, virtual_tokens, orders, seed)
    cultures = []
    for name, expert in chosen:
        train: list[Example] = []
        dev: list[Example] = []
        for record, shares in found[name]:
            example = encoder.example(record, shares)
            (dev if _held_out(record.question, dev_share) else train).append(example)
        if not train:
            raise WhispersError(
                f"{source.path}: the culture {name!r} has no example left to train on, all {len(dev)} are held out; accepted: more "
                "of them, or a smaller dev share"
            )
        cultures.append(Culture(name, expert, tuple(train), tuple(dev)))
    return cultures


def pooled(cultures: Sequence[Culture]) -> Culture:
    """All of them as one. A record whose options several choose among is one example, with the mean of their shares: a cross-entropy is
    linear in what is wanted, so its gradient is the mean of theirs, for the cost of one. Free answers stay as many as there are: merged,
    one that nine gave would be drawn no more often than one that a tenth gave."""
    train = _merged(example for culture in cultures for example in culture.train)
    dev = _merged(example for culture in cultures for example in culture.dev)
    return Culture("all cultures", "shared", train, dev)


def _merged(examples: Iterable[Example]) -> tuple[Example, ...]:
    same: dict[tuple[int, tuple[Prompt, ...]], list[Example]] = {}
    for at, example in enumerate(examples):
        own = 0 if example.prompts[0].compete else 1 + at  # of free answers each has a place of its own
        same.setdefault((own, example.prompts), []).append(example)
    return tuple(
        Example(
            several[0].question,
            prompts,
            tuple(
                tuple(math.fsum(column) / len(several) for column in zip(*shares, strict=True))
                for shares in zip(*(one.shares for one in several), strict=True)
            ),
        )
        for (_, prompts), several in same.items()
    )


def expert_name(culture: str) -> str:
    """A culture's name as an expert's: lower case, with hyphens."""
    plain = unicodedata.normalize("NFKD", culture).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.casefold()).strip("-")[:64].strip("-")


def _by_culture(source: RecordFile) -> dict[str, list[tuple[Record, tuple[float, ...]]]]:
    found: dict[str, list[tuple[Record, tuple[float, ...]]]] = {}
    for record in source.records:
        for culture, shares in _answers(record).items():
            found.setdefault(culture, []).append((record, shares))
    if not found:
        raise WhispersError(f"{source.path}: names no culture in any record; accepted: records with answers")
    return found


def _answers(record: Record) -> Mapping[str, tuple[float, ...]]:
    if isinstance(record, TextRecord):
        return {record.culture: (1.0,)}
    if isinstance(record, ChoiceRecord):
        every = range(len(record.options))
        return {culture: tuple(float(at == index) for at in every) for culture, index in record.answer.items()}
    assert isinstance(record, ShareRecord)
    # Shares sum to one within a tolerance; a loss wants them to sum to one.
    return {culture: tuple(share / math.fsum(shares) for share in shares) for culture, shares in record.dist.items()}


def _chosen(source: RecordFile, cultures: list[str], wanted: Sequence[str] | None) -> list[tuple[str, str]]:
    """Cultures and their experts' names."""
    if wanted is not None:
        by_name = {expert_name(culture): culture for culture in cultures} | {culture: culture for culture in cultures}
        for name in wanted:
            if name not in by_name:
                shown = ", ".join(sorted(cultures)[:20]) + (", ..." if len(cultures) > 20 else "")
                raise WhispersError(f"{source.path}: the culture {name!r} has no example; accepted: {shown}")
        cultures = list(dict.fromkeys(by_name[name] for name in wanted))
        if not cultures:
            raise WhispersError(f"experts: none is named; accepted: cultures of {source.path}")
        if len(cultures) != len(wanted):  # by its own name and its expert's, too
            raise WhispersError(f"experts: {list(wanted)!r} names one twice; accepted: every name once")
    taken: dict[str, str] = {}
    for culture in cultures:
        name = expert_name(culture)
        try:
            check_name(name)
        except WhispersError as error:
            raise WhispersError(
                f"{source.path}: the culture {culture!r} gives no name for an expert: {error}"
            ) from error
        if name in taken:
            raise WhispersError(
                f"{source.path}: the cultures {taken[name]!r} and {culture!r} would both be the expert {name!r}; accepted: "
                "cultures that differ in more than case and punctuation"
            )
        taken[name] = culture
    return [(culture, name) for name, culture in taken.items()]


def _held_out(question: str, share: float) -> bool:
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _Encoder:
    """Records as token ids; each is encoded once, for all its cultures."""

    def __init__(
        self, source: RecordFile, chat: ChatEncoder, config: ModelConfig, virtual_tokens: int, orders: int, seed: int
    ):
        self._source = source
        self._chat = chat
        self._config = config
        self._virtual_tokens = virtual_tokens
        self._orders = orders
        self._seed = seed
        self._questions: dict[str, int] = {}
        self._encoded: dict[int, tuple[tuple[Prompt, ...], list[list[int]]]] = {}  # by line

    def example(self, record: Record, shares: tuple[float, ...]) -> Example:
        if record.line not in self._encoded:
            try:
                self._encoded[record.line] = self._encode(record)
            except WhispersError as error:
                raise WhispersError(f"{self._source.where(record)}: {error}") from error
        prompts, orders = self._encoded[record.line]
        question = self._questions.setdefault(record.question, len(self._questions))
        return Example(question, prompts, tuple(tuple(shares[at] for at in order) for order in orders))

    def _encode(self, record: Record) -> tuple[tuple[Prompt, ...], list[list[int]]]:
        if isinstance(record, TextRecord):
            question, _ = prompt(record)
            context, header = self._chat.split(question)
            answer = [*self._chat.option(record.answer), self._chat.end_of_turn(self._config.eos_ids)]
            orders = [[0]]
            prompts = [Prompt(tuple(context), tuple(header), (tuple(answer),), compete=False)]
        else:
            orders = self._orders_of(record)
            prompts = []
            for order in orders:
                question, texts = prompt(replace(record, options=tuple(record.options[at] for at in order)))
                context, header = self._chat.split(question)
                options = tuple(tuple(self._chat.option(text)) for text in texts)
                prompts.append(Prompt(tuple(context), tuple(header), options, compete=True))
        longest = max(found.tokens for found in prompts) + self._virtual_tokens
        if longest > self._config.max_position:
            raise WhispersError(
                f"takes {longest} tokens with its longest answer and {self._virtual_tokens} virtual tokens; accepted: "
                f"{self._config.max_position}, this base's max_position_embeddings"
            )
        return tuple(prompts), orders

    def _orders_of(self, record: Record) -> list[list[int]]:
        """The listed order, and others drawn by seed and question; options that are not listed have no order."""
        orders = [list(range(len(record.options)))]
        if isinstance(record, ShareRecord):
            digest = hashlib.sha256(f"{self._seed} {record.question}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            for _ in range(8 * self._orders):  # of few options there are few orders
                if len(orders) >= self._orders:
                    break
                order = generator.permutation(len(record.options)).tolist()
                if order not in orders:
                    orders.append(order)
        return orders
