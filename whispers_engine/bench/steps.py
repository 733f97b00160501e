"""Whole decode steps, ours and transformers': the same weights, contexts and soft prompts in, tokens and times out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from whispers_engine.chat import ChatEncoder
from whispers_engine.decode import Decoder
from whispers_engine.experts import Expert
from whispers_engine.intake import Intake
from whispers_engine.kv_cache import PagePool
from whispers_engine.model import Model
from whispers_engine.panel import Panel
from whispers_engine.request import Event, Request, Token
from whispers_engine.sampling import SamplingParams
from whispers_engine.scheduler import Scheduler
from whispers_engine.weights import Weights
from whispers_kernels.ops import check_impl

from .llama import LlamaShape, transformers_model

SOFT_TOKENS, HEADER_TOKENS = 16, 4
_FINGERPRINT = "random weights"
_KINDS = ("dynamic", "static", "compiled")


@dataclass
class Decoded:
    """What one run gave: per expert its tokens and their log-probabilities, and the milliseconds of every step but the first."""

    tokens: list[list[int]]  # [E][new tokens]
    logprobs: list[list[float]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Prompt:
    """One context, a header, and E soft prompts between them (placement `suffix`)."""

    context: list[int]
    header: list[int]
    soft: Tensor  # [E, m, hidden] float32

    @classmethod
    def random(cls, shape: LlamaShape, weights: Weights, experts: int, context: int, seed: int = 0) -> Prompt:
        """Random tokens, and soft prompts of the embeddings' own size, so that they matter."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(shape.vocab, (context + HEADER_TOKENS,), generator=generator).tolist()
        spread = float(weights.embeddings[:64].float().std())
        soft = torch.randn(experts, SOFT_TOKENS, shape.hidden, generator=generator) * spread
        return cls(ids[:context], ids[context:], soft)

    def embeds(self, weights: Weights, experts: int) -> Tensor:
        """What transformers is given: the context once for each expert, `[E, context + m + header, hidden]`."""
        table = weights.embeddings
        context, header = (table[torch.tensor(ids, device=table.device)] for ids in (self.context, self.header))
        soft = self.soft[:experts].to(table.device, table.dtype)
        return torch.cat((context.expand(experts, -1, -1), soft, header.expand(experts, -1, -1)), dim=1)

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
        pool = PagePool(
            pages, page_size, config.num_layers, config.kv_heads, config.head_dim, model.dtype, model.device
        )
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
        question = (self._prompt.context, self._prompt.header)
        request = Request(question, experts=names, sampling=SamplingParams(max_tokens=new_tokens))
        self._scheduler.add(self._intake.task(request, events.append))
        out = Decoded([[] for _ in names], [[] for _ in names])
        while self._scheduler.busy:
            started = bool(out.tokens[0])
            start = time.perf_counter()
            self._scheduler.step()  # hands out tokens, and so ends when they are there
            elapsed = (time.perf_counter() - start) * 1e3
            tokens = [event for event in events if isinstance(event, Token)]
            events.clear()
            if started and len(tokens) == experts:
                out.step_ms.append(elapsed)
            for event in tokens:
                assert event.expert is not None
                row = names.index(event.expert)
                out.tokens[row].append(event.token)
                out.logprobs[row].append(event.logprob)
        return out


class Transformers:
    """transformers' Llama over the same weights, a batch of E sequences that each hold the context.

    Args:
        kind: its cache: "dynamic" (grows by concatenation, the default of `generate`), "static", or "compiled": static, with the decode
            step compiled and its CUDA graph replayed.
        length: positions of a static cache.
    """

    def __init__(self, shape: LlamaShape, weights: Weights, kind: str = "dynamic", length: int = 0):
        assert kind in _KINDS
        self._model = transformers_model(shape, weights)
        self._weights = weights
        self._kind = kind
        self._length = length
        self._caches: dict[int, Any] = {}  # static ones, by batch: a compiled step keeps their addresses
        self._step: Any = self._model
        if kind == "compiled":
            self._step = torch.compile(self._model, mode="reduce-overhead", dynamic=False)

    def _cache(self, batch: int) -> Any:
        from transformers import DynamicCache, StaticCache

        if self._kind == "dynamic":
            return DynamicCache(config=self._model.config)
        if batch not in self._caches:
            self._caches[batch] = StaticCache(config=self._model.config, max_cache_len=self._length)
        self._caches[batch].reset()
        return self._caches[batch]

    @torch.inference_mode()
    def decode(self, prompt: Prompt, experts: int, new_tokens: int) -> Decoded:
        """Answers the prompt with the first so many experts, greedily."""
        cache = self._cache(experts)
        embeds = prompt.embeds(self._weights, experts)
        first = self._model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen = first.logits[:, -1].argmax(-1, keepdim=True)  # [E, 1]
        steps, step_ms = [chosen[:, 0].tolist()], []
        for _ in range(1, new_tokens):
            start = time.perf_counter()
            logits = self._step(input_ids=chosen, past_key_values=cache, use_cache=True).logits
            chosen = logits[:, -1].argmax(-1, keepdim=True)
            steps.append(chosen[:, 0].tolist())  # tokens are handed out, as they are in ours
            step_ms.append((time.perf_counter() - start) * 1e3)
        return Decoded([list(tokens) for tokens in zip(*steps, strict=True)], step_ms=step_ms)

    @torch.inference_mode()
    def logprobs(self, prompt: Prompt, tokens: Sequence[Sequence[int]]) -> Tensor:
        """The distributions that these tokens were chosen from, all of them given: float32 `[E, new tokens, V]`."""
        table = self._weights.embeddings
        given = table[torch.tensor(tokens, device=table.device)[:, :-1]]  # [E, n - 1, hidden]
        embeds = torch.cat((prompt.embeds(self._weights, len(tokens)), given), dim=1)
        logits = self._model(inputs_embeds=embeds, logits_to_keep=len(tokens[0])).logits
        return logits.float().log_softmax(-1)


def _tokenizer(vocab: int) -> Any:
    """A word for every id: text is made out of tokens as with any other base."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocab)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
