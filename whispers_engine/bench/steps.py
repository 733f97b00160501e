"""Whole decode steps of ours: contexts and soft prompts in, tokens and times out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from whispers_engine.chat import ChatEncoder
from whispers_engine.decode import Decoder
from whispers_engine.experts import Expert
from whispers_engine.intake import Intake
from whispers_engine.model import Model
from whispers_engine.panel import Panel
from whispers_engine.request import Event, Request, Token
from whispers_engine.sampling import SamplingParams
from whispers_engine.scheduler import Scheduler
from whispers_engine.weights import Weights
from whispers_kernels.ops import check_impl

from .llama import LlamaShape

SOFT_TOKENS, HEADER_TOKENS = 16, 4
_FINGERPRINT = "random weights"


@dataclass
class Decoded:
    """What one run gave: per expert its tokens and their log-probabilities, and the milliseconds of every step but the first."""

    tokens: list[list[int]]  # [E][new tokens]
    logprobs: list[list[float]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    @classmethod
    def of_steps(cls, steps: Sequence[Sequence[int]], step_ms: list[float]) -> Decoded:
        """From the tokens of every step, `[new tokens][E]`."""
        return cls([list(tokens) for tokens in zip(*steps, strict=True)], step_ms=step_ms)


@dataclass(frozen=True)
class Prompt:
    """One context, a header, and E soft prompts between them (placement `suffix`)."""

    context: list[int]
    header: list[int]
    soft: Tensor  # [E, m, hidden] float32
    soft_ids: list[list[int]] | None = (
        None  # [E][m] the tokens whose embeddings they are, for a peer that takes nothing else
    )

    @classmethod
    def random(cls, shape: LlamaShape, weights: Weights, experts: int, context: int, seed: int = 0) -> Prompt:
        """Random tokens, and soft prompts of the embeddings' own size, so that they matter."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(shape.vocab, (context + HEADER_TOKENS,), generator=generator).tolist()
        spread = float(weights.embeddings[:64].float().std())
        soft = torch.randn(experts, SOFT_TOKENS, shape.hidden, generator=generator) * spread
        return cls(ids[:context], ids[context:], soft)

    def own_embeds(self, table: Tensor, experts: int) -> Tensor:
        """What each expert adds to the context, `[E, m + header, hidden]` in the dtype of the embedding table `[V, hidden]`."""
        header = table[torch.tensor(self.header, device=table.device)]
        soft = self.soft[:experts].to(table.device, table.dtype)
        return torch.cat((soft, header.expand(experts, -1, -1)), dim=1)

    def branch_keys(self, new_tokens: int) -> float:
        """Keys of one branch's own that a step reads, on the average over the steps."""
        return SOFT_TOKENS + len(self.header) + new_tokens / 2


class Rig:
    """The engine's own scheduler over a model that is on no disk: one request at a time, its experts' steps timed.

    Where the engine would capture its decode steps as CUDA graphs, so does the rig.

    Args:
        prompt: its soft prompts become the experts; all requests are about it.
        new_tokens: the most that a request generates.
        impl: the kernels' implementation.
    """

    def __init__(self, shape: LlamaShape, weights: Weights, prompt: Prompt, new_tokens: int, impl: str = "auto"):
        config = shape.config()
        impl = check_impl(impl, weights.embeddings.device)
        model = Model(config, weights, impl)
        cuda = model.device.type == "cuda"
        page_size, experts = 64 if cuda else 16, prompt.soft.shape[0]
        own = SOFT_TOKENS + len(prompt.header) + new_tokens
        pages = len(prompt.context) // page_size + 1 + experts * (own // page_size + 1)
        pool = model.new_pool(pages, page_size)
        decoder = Decoder(model, pool, capture=True) if cuda and impl == "triton" else None
        self._scheduler = Scheduler(model, pool, experts, 8192 if cuda else 512, decoder)
        panel = Panel(self._scheduler, _FINGERPRINT)
        self._names = [f"expert-{index}" for index in range(experts)]
        panel.add([Expert(name, soft) for name, soft in zip(self._names, prompt.soft, strict=True)])
        chat = ChatEncoder(_tokenizer(shape.vocab), shape.vocab)
        self._intake = Intake(self._scheduler, panel, chat, _FINGERPRINT)
        self._prompt = prompt

    def decode(self, experts: int, new_tokens: int) -> Decoded:
        """Answers the prompt with the first so many experts, greedily."""
        names = self._names[:experts]
        events: list[Event] = []
        self._scheduler.add(self._intake.task(greedy(self._prompt, names, new_tokens), events.append))

        def step() -> list[Event]:
            events.clear()
            self._scheduler.step()
            return events

        return timed(step, names, new_tokens)


def greedy(prompt: Prompt, names: Sequence[str], new_tokens: int) -> Request:
    """The prompt as a request to these experts; every branch runs to its last token, whatever the others say."""
    sampling = SamplingParams(max_tokens=new_tokens)
    return Request((prompt.context, prompt.header), experts=list(names), sampling=sampling, early_end=False)


def timed(step: Callable[[], Sequence[Event]], names: Sequence[str], new_tokens: int) -> Decoded:
    """Runs the engine's steps until every branch has its tokens; times those in which all of them advance."""
    rows = {name: row for row, name in enumerate(names)}
    out = Decoded([[] for _ in names], [[] for _ in names])
    while any(len(tokens) < new_tokens for tokens in out.tokens):
        started = bool(out.tokens[0])
        start = time.perf_counter()
        events = step()  # hands out tokens, and so ends when they are there
        elapsed = (time.perf_counter() - start) * 1e3
        tokens = [event for event in events if isinstance(event, Token)]
        if started and len(tokens) == len(names):
            out.step_ms.append(elapsed)
        for event in tokens:
            assert event.expert is not None
            out.tokens[rows[event.expert]].append(event.token)
            out.logprobs[rows[event.expert]].append(event.logprob)
    return out


def _tokenizer(vocab: int) -> Any:
    """A word for every id: text is made out of tokens as with any other base."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocab)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
