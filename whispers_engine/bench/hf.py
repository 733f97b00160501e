"""transformers as a contender: a batch of E sequences that each hold the context, its own caches, its own greedy steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .steps import Decoded, Prompt

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # in peers' names
_KINDS = ("dynamic", "static", "compiled")


class Transformers:
    """A causal language model of transformers', steps timed as ours are.

    A dynamic cache is prefilled with the context once and then repeated for every expert, which is the most that its users can share;
    what a run adds is cropped off again, so that a second run of the same prompt begins with its private tokens.

    Args:
        model: in evaluation mode, on its device and in its dtype.
        kind: its cache: "dynamic" (grows by concatenation, the default of `generate`), "static", or "compiled": static, with the decode
            step compiled and its CUDA graph replayed.
        length: positions of a static cache.
    """

    def __init__(self, model: Any, kind: str = "dynamic", length: int = 0):
        assert kind in _KINDS
        self._model = model
        self.table: Tensor = model.get_input_embeddings().weight
        self._kind = kind
        self._length = length
        self._caches: dict[int, Any] = {}  # static ones, by batch: a compiled step keeps their addresses
        self._begun: tuple[Prompt, int, Any, Tensor] | None = (
            None  # whose: prompt, experts; cache and logits behind the prompt
        )
        self._step: Any = model
        if kind == "compiled":
            self._step = torch.compile(model, mode="reduce-overhead", dynamic=False)

    @torch.inference_mode()
    def decode(self, prompt: Prompt, experts: int, new_tokens: int) -> Decoded:
        """Answers the prompt with the first so many experts, greedily."""
        cache, logits = self._begin(prompt, experts)
        chosen = logits.argmax(-1, keepdim=True)  # [E, 1]
        steps, step_ms = [chosen[:, 0].tolist()], []
        for _ in range(1, new_tokens):
            start = time.perf_counter()
            logits = self._step(input_ids=chosen, past_key_values=cache, use_cache=True).logits
            chosen = logits[:, -1].argmax(-1, keepdim=True)
            steps.append(chosen[:, 0].tolist())  # tokens are handed out, as they are in ours
            step_ms.append((time.perf_counter() - start) * 1e3)
        return Decoded.of_steps(steps, step_ms)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> tuple[int, float]:
        """The greedy token behind these, nothing of them being known, and the milliseconds that it took."""
        start = time.perf_counter()
        token = int(self._behind(ids).argmax())
        return token, (time.perf_counter() - start) * 1e3

    @torch.inference_mode()
    def behind(self, ids: Sequence[int]) -> Tensor:
        """The distribution behind these, log-probabilities in float32 `[V]`."""
        return self._behind(ids).float().log_softmax(-1)

    @torch.inference_mode()
    def first(self, prompt: Prompt, experts: int) -> Tensor:
        """The logits behind context, soft prompt and header, float32 `[E, V]`."""
        return self._begin(prompt, experts)[1].float()

    @torch.inference_mode()
    def logprobs(self, prompt: Prompt, tokens: Sequence[Sequence[int]]) -> Tensor:
        """The distributions that these tokens were chosen from, all of them given: float32 `[E, new tokens, V]`."""
        cache, first = self._begin(prompt, len(tokens))
        logits = first[:, None]  # [E, 1, V]
        given = self._tensor(tokens)[:, :-1]  # [E, n - 1]
        if given.shape[1]:
            later = self._model(input_ids=given, past_key_values=cache, use_cache=True).logits
            logits = torch.cat((logits, later), dim=1)
        return logits.float().log_softmax(-1)

    def forget(self) -> None:
        """Gives up the dynamic cache of the last prompt."""
        self._begun = None

    def _behind(self, ids: Sequence[int]) -> Tensor:
        logits: Tensor = self._model(input_ids=self._tensor([ids]), use_cache=True, logits_to_keep=1).logits
        return logits[0, -1]

    def _tensor(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(ids, device=self.table.device)

    def _begin(self, prompt: Prompt, experts: int) -> tuple[Any, Tensor]:
        """A cache that holds context, soft prompt and header for every expert, and the logits behind them, `[E, V]`."""
        own = prompt.own_embeds(self.table, experts)
        if self._kind == "dynamic":
            return self._repeated(prompt, experts, own)
        context = self.table[torch.tensor(prompt.context, device=self.table.device)]
        embeds = torch.cat((context.expand(experts, -1, -1), own), dim=1)
        cache = self._static_cache(experts)
        return cache, self._forward(embeds, cache)

    def _repeated(self, prompt: Prompt, experts: int, own: Tensor) -> tuple[Any, Tensor]:
        from transformers import DynamicCache

        length = len(prompt.context) + own.shape[1]
        if self._begun is not None and self._begun[0] is prompt and self._begun[1] == experts:
            cache, logits = self._begun[2:]
            cache.crop(length - cache.get_seq_length())  # a negative number: how many go
            return cache, logits
        self.forget()  # before there is another: two would hold a committee's caches twice
        cache = DynamicCache(config=self._model.config)
        self._forward(self.table[torch.tensor(prompt.context, device=self.table.device)][None], cache)
        cache.batch_repeat_interleave(experts)
        logits = self._forward(own, cache)
        self._begun = (prompt, experts, cache, logits)
        return cache, logits

    def _forward(self, embeds: Tensor, cache: Any) -> Tensor:
        """The last position's logits `[E, V]`; a cache that only the step is compiled for is filled without it."""
        return self._model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _static_cache(self, batch: int) -> Any:
        from transformers import StaticCache

        if batch not in self._caches:
            self._caches[batch] = StaticCache(config=self._model.config, max_cache_len=self._length)
        self._caches[batch].reset()
        return self._caches[batch]
