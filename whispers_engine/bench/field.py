"""The field of `bench decode` and `bench prefill`: who runs the same base beside us, how it is set up, and whether it may be timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whispers_engine.errors import WhispersError
from whispers_kernels.cpp.packing import quantize

from .check import Verdict, by_how_much
from .gguf_file import as_gguf
from .hf import SHORT, Transformers
from .llamacpp import LlamaCpp, LlamaModel, Setting, features
from .measure import first_line
from .peers import Unavailable
from .steps import Decoded, Prompt

_TRANSFORMERS = {"transformers-fp32": torch.float32, "transformers-bf16": torch.bfloat16}
_LLAMA = {"llama.cpp-f32": "f32", "llama.cpp-bf16": "bf16", "llama.cpp-q8_0": "q8_0"}
GROUPS = {"transformers": list(_TRANSFORMERS), "llama.cpp": list(_LLAMA)}
_BEGIN = 64  # of the random tokens: below lie special ones
_CHECKED_TOKENS = 3  # the first, and two of steps
# Times the largest error that transformers makes in bfloat16, over the vocabulary: eight bits a block err about twice as much, and rotary
# pairs that are not interleaved ten times.
_ALLOWED = 4.0


def peers_of(names: Sequence[str] | None, dtype: torch.dtype | None = None) -> list[str]:
    """Peers by their own names or their group's. llama.cpp in float32 stands for its group only where ours is in float32.

    Raises:
        WhispersError: a name that is none.
    """
    found: dict[str, None] = {}
    for name in GROUPS if names is None else names:
        members = GROUPS.get(name, [name])
        if not set(members) <= {*_TRANSFORMERS, *_LLAMA}:
            accepted = ", ".join([*GROUPS, *_TRANSFORMERS, *_LLAMA])
            raise WhispersError(f"--vs: {name}; accepted: {accepted}, with commas between")
        if name in GROUPS and dtype != torch.float32:
            members = [member for member in members if member != "llama.cpp-f32"]
        found |= dict.fromkeys(members)
    return list(found)


def matched(dtype: torch.dtype, quantization: str | None) -> dict[str, list[str]]:
    """By group, the peers that our precision is to be compared with: llama.cpp in the same one, transformers in its better one."""
    same = "q8_0" if quantization else "f32" if dtype == torch.float32 else "bf16"
    return {"llama.cpp": [f"llama.cpp-{same}"], "transformers": list(_TRANSFORMERS)}


class Entry(NamedTuple):
    """One setting of one peer, ready to run; it was judged already."""

    peer: str
    setting: str
    decode: Callable[[Prompt, int, int], Decoded]
    prefill: Callable[[Sequence[int]], tuple[int, float]]
    forget: Callable[[], None]
    close: Callable[[], None]

    @property
    def name(self) -> str:
        return f"{self.peer}, {self.setting}" if self.setting else self.peer


class Field:
    """The peers over one base, loaded when they are first asked for.

    Args:
        folder: the base.
        device: of transformers; llama.cpp runs on a CPU only.
        progress: is told what is being prepared.
    """

    def __init__(self, folder: Path, device: torch.device, progress: Callable[[str], None]):
        self._folder = folder
        self._device = device
        self._progress = progress
        self._transformers: dict[tuple[torch.dtype, torch.dtype | None], Transformers] = {}
        self._llama: dict[str, LlamaModel] = {}

    def transformers(self, dtype: torch.dtype, int8_of: torch.dtype | None = None) -> Transformers:
        """The base as transformers loads it, in this dtype; `int8_of`: with the layers' matrices as `quantization="int8"` makes them of
        weights in that dtype."""
        key = dtype, int8_of
        if key not in self._transformers:
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging

            logging.disable_progress_bar()
            self._progress(f"loading transformers in {SHORT[dtype]}{'' if int8_of is None else ', weights of int8'}")
            model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=dtype, attn_implementation="sdpa")
            if int8_of is not None:
                _round_to_int8(model, int8_of)
            self._transformers[key] = Transformers(model.to(self._device).eval().requires_grad_(False))
        return self._transformers[key]

    def embeddings(self) -> Tensor:
        """The base's table, float32 `[V, hidden]`."""
        return self.transformers(torch.float32).table

    def entries(
        self, names: Sequence[str], prompt: Prompt, experts: int, room: int, ubatches: Sequence[int] = (512,)
    ) -> tuple[list[Entry], dict[str, Any], dict[str, str]]:
        """Sets the peers up for a prompt and judges them: their first distribution, and the tokens that they choose next.

        Args:
            names: peers.
            room: positions that each expert takes behind the context.
            ubatches: of llama.cpp; every one is a setting, with flash attention and without.

        Returns:
            Those that may be timed; by peer, its error and budget, the worst of its settings; by peer, why it is left out.
        """
        exact, half = (
            self.transformers(dtype).first(prompt, experts).log_softmax(-1) for dtype in (torch.float32, torch.bfloat16)
        )
        # A peer in float32 rounds to 16 bits inside, too (llama.cpp's flash attention does): one budget for all.
        budget = _ALLOWED * float((half - exact).abs().max())
        entries: list[Entry] = []
        errors: dict[str, Any] = {}
        left_out: dict[str, str] = {}
        for name in names:
            for entry, first, tokens in self._settings(name, prompt, experts, room, ubatches, left_out):
                error = float((first.log_softmax(-1) - exact).abs().max())
                truth = self.transformers(torch.float32).logprobs(prompt, tokens)
                verdict = Verdict(max(error, by_how_much(truth, tokens)), budget)
                if verdict.ok:
                    entries.append(entry)
                    worst = max(verdict.error, errors.get(name, {}).get("error", 0.0))
                    errors[name] = {"error": worst, "budget": budget}
                else:
                    entry.close()
                    left_out[entry.name] = f"wrong: error {verdict.error:.1e}, budget {budget:.1e}"
        return entries, errors, left_out

    def _settings(
        self,
        name: str,
        prompt: Prompt,
        experts: int,
        room: int,
        ubatches: Sequence[int],
        left_out: dict[str, str],
    ) -> Iterator[tuple[Entry, Tensor, list[list[int]]]]:
        """Every setting of a peer that runs, its logits behind the prompt `[E, V]`, its first tokens; notes why others do not."""
        self._progress(f"preparing {name}")
        try:
            if name in _TRANSFORMERS:
                model = self.transformers(_TRANSFORMERS[name])
                entry = Entry(name, "", model.decode, model.prefill, model.forget, lambda: None)
                yield entry, model.first(prompt, experts), model.decode(prompt, experts, _CHECKED_TOKENS).tokens
                return
            llama, exact = self.llama(_LLAMA[name]), _LLAMA[name] == "f32"
            length = len(prompt.context) + experts * room
            for ubatch, flash in product(ubatches, (True, False)):
                setting = Setting(flash, ubatch)
                context = LlamaCpp(llama, setting, experts, length, exact)
                entry = Entry(name, setting.name, context.decode, context.prefill, context.forget, context.close)
                try:
                    first, tokens = context.first(prompt, experts), context.decode(prompt, experts, _CHECKED_TOKENS)
                except BaseException:
                    entry.close()  # its memory is C's
                    raise
                yield entry, first, tokens.tokens
        except (Unavailable, WhispersError) as error:
            left_out[name] = str(error)
        except Exception as error:  # a peer's failure is its own, whatever it raises
            left_out[name] = first_line(error)

    def llama(self, kind: str) -> LlamaModel:
        """The base as llama.cpp loads it. Raises Unavailable, or WhispersError for a base that cannot be had as GGUF."""
        if self._device.type != "cpu":
            raise Unavailable("measured on a CPU only")
        if kind not in self._llama:
            features()  # before a file is written that nothing could read
            path = as_gguf(self._folder, kind, lambda what, done, total: self._progress(f"{what}: {done} of {total}"))
            self._llama[kind] = LlamaModel(path)
        return self._llama[kind]

    def forget(self) -> None:
        """Gives up the caches of the last prompt: the next one's may be large."""
        for model in self._transformers.values():
            model.forget()
        gc.collect()


@torch.no_grad()
def _round_to_int8(model: Any, dtype: torch.dtype) -> None:
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            numbers, scale = quantize(module.weight.to(dtype))
            module.weight.copy_(numbers * scale[:, None])


def random_prompt(table: Tensor, experts: int, context: int, soft: int = 12, header: int = 4, seed: int = 0) -> Prompt:
    """Random tokens; the soft prompts are the embeddings of some, so that a peer without soft prompts computes the same.

    Prompts of one seed begin alike, whatever their length.

    Args:
        table: `[V, hidden]`.
        soft, header: private tokens of each expert: its soft prompt and the header.
    """
    vocab = table.shape[0]
    begin = min(_BEGIN, vocab // 2)

    def ids(*size: int, seed: int) -> Tensor:
        return torch.randint(begin, vocab, size, generator=torch.Generator().manual_seed(seed))

    own = ids(experts, soft, seed=seed + 1)
    return Prompt(
        ids(context, seed=seed).tolist(),
        ids(header, seed=seed + 2).tolist(),
        table[own.to(table.device)].float().cpu(),
        own.tolist(),
    )
