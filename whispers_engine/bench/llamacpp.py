"""llama.cpp as a contender, through its C interface: the context once, every expert's sequence copied onto it.

Nothing here needs llama.cpp to be imported: whoever measures beside it builds it, from the extra `llama`.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .peers import Unavailable
from .steps import Decoded, Prompt

_ALIGNED = 256  # llama.cpp rounds a context's cells up to a multiple of these


class Setting(NamedTuple):
    """What a user of llama.cpp would try."""

    flash: bool
    ubatch: int = 512  # tokens of a prefill that are computed at once

    @property
    def name(self) -> str:
        return f"flash attention {'on' if self.flash else 'off'}, n_ubatch {self.ubatch}"


def library() -> Any:
    """The module `llama_cpp`, made silent. Raises Unavailable where it is not installed or does not load."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"not installed: pip install 'whispers-engine[llama]' ({error})") from error
    if llama_cpp not in _silent:
        _silent[llama_cpp] = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(_silent[llama_cpp], ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
    return llama_cpp


_silent: dict[Any, Any] = {}  # by library, the callback that C holds, and Python must not drop


def features() -> str:
    """The instruction sets that this build of llama.cpp uses, in its own words: "AVX512 = 1 | ..."."""
    return str(library().llama_print_system_info().decode()).removeprefix("CPU :").strip(" |")


class LlamaModel:
    """A GGUF file, loaded once for all the contexts over it. Raises Unavailable for one that llama.cpp does not load."""

    def __init__(self, path: Path):
        self.lib = library()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.handle = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise Unavailable(f"llama.cpp does not load {path.name}")
        self.vocab = int(self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.handle)))

    def close(self) -> None:
        if self.handle:
            self.lib.llama_model_free(self.handle)
            self.handle = None


class LlamaCpp:
    """One context of llama.cpp: E sequences over one unified cache, in which the prompt's context is stored once.

    Args:
        model: what computes.
        setting: flash attention or not, and how much at once.
        experts: sequences.
        length: positions that all of them take together.
        exact: store float32 keys and values instead of llama.cpp's default float16.
        threads: None: as many as PyTorch uses.
    """

    def __init__(
        self,
        model: LlamaModel,
        setting: Setting,
        experts: int,
        length: int,
        exact: bool = False,
        threads: int | None = None,
    ):
        lib = self._lib = model.lib
        params = lib.llama_context_default_params()
        params.n_ctx = -(-length // _ALIGNED) * _ALIGNED
        params.n_batch = max(setting.ubatch, experts)
        params.n_ubatch = max(setting.ubatch, experts)
        params.n_seq_max = experts
        params.n_threads = params.n_threads_batch = threads or torch.get_num_threads()
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if setting.flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.kv_unified = True
        params.no_perf = True
        if exact:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
        self._model = model  # which must outlive the context
        self._handle = lib.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise Unavailable(f"llama.cpp makes no context of {params.n_ctx} positions for {experts} sequences")
        self._memory = lib.llama_get_memory(self._handle)
        self._most = int(params.n_batch)
        self._batch = lib.llama_batch_init(self._most, 0, 1)
        self._filled = _Columns(self._batch, self._most)
        self._begun: tuple[Prompt, int, Tensor] | None = (
            None  # whose sequences these are: prompt, experts; logits behind it
        )

    def decode(self, prompt: Prompt, experts: int, new_tokens: int) -> Decoded:
        """Answers the prompt with the first so many experts, greedily."""
        first = self.first(prompt, experts)
        chosen = first.numpy().argmax(-1)  # [E]
        steps, step_ms = [chosen.tolist()], []
        begin = len(prompt.context) + len(self._own(prompt, 0))
        self._filled.set_sequences(range(experts))
        for step in range(new_tokens - 1):
            start = time.perf_counter()
            self._filled.set_tokens(chosen, begin + step)
            self._run(experts)
            chosen = self._logits(experts).argmax(-1)
            steps.append(chosen.tolist())
            step_ms.append((time.perf_counter() - start) * 1e3)
        return Decoded.of_steps(steps, step_ms)

    def first(self, prompt: Prompt, experts: int) -> Tensor:
        """The logits behind context, soft prompt and header, float32 `[E, V]`; whatever a run has added is taken out again."""
        own = [self._own(prompt, row) for row in range(experts)]
        begin = len(prompt.context)
        if self._begun is not None and self._begun[0] is prompt and self._begun[1] == experts:
            for row in range(experts):
                self._lib.llama_memory_seq_rm(self._memory, row, begin + len(own[row]), -1)
            return self._begun[2]
        self._lib.llama_memory_clear(self._memory, True)
        self._append(prompt.context, 0, 0)
        for row in range(1, experts):
            self._lib.llama_memory_seq_cp(self._memory, 0, row, -1, -1)
        together = self._most // max(map(len, own))  # experts whose own tokens are one batch
        parts = [self._append_each(own[at : at + together], begin, at) for at in range(0, experts, together)]
        logits = torch.cat(parts)
        self._begun = (prompt, experts, logits)
        return logits

    def prefill(self, ids: Sequence[int]) -> tuple[int, float]:
        """The greedy token behind these, nothing of them being known, and the milliseconds that it took."""
        self.forget()
        self._lib.llama_memory_clear(self._memory, False)
        start = time.perf_counter()
        self._append(ids, 0, 0)
        token = int(self._logits(1).argmax())
        return token, (time.perf_counter() - start) * 1e3

    def forget(self) -> None:
        """Begins the next run from nothing."""
        self._begun = None

    def close(self) -> None:
        if self._handle:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._handle)
            self._handle = None

    @staticmethod
    def _own(prompt: Prompt, row: int) -> list[int]:
        assert prompt.soft_ids is not None
        return [*prompt.soft_ids[row], *prompt.header]

    def _append(self, ids: Sequence[int], position: int, sequence: int) -> None:
        """Appends tokens to one sequence; the logits that remain are those of the last."""
        for begin in range(0, len(ids), self._most):
            part = ids[begin : begin + self._most]
            last = begin + len(part) == len(ids)
            self._filled.set_run(part, position + begin, sequence, last)
            self._run(len(part))

    def _append_each(self, runs: Sequence[Sequence[int]], position: int, first: int) -> Tensor:
        """Appends runs of tokens to as many sequences, from the `first` on, in one batch; the logits behind each."""
        rows = 0
        for sequence, ids in enumerate(runs, first):
            self._filled.set_run(ids, position, sequence, True, rows)
            rows += len(ids)
        self._run(rows)
        return torch.from_numpy(self._logits(len(runs)).copy())

    def _run(self, tokens: int) -> None:
        self._batch.n_tokens = tokens
        status = self._lib.llama_decode(self._handle, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for {tokens} tokens")

    def _logits(self, rows: int) -> np.ndarray:
        """The last step's logits, float32 `[rows, V]`: llama.cpp's own memory, valid until the next step.

        They stay NumPy's: PyTorch would choose among them with threads of its own, which wait for more work on the cores that
        llama.cpp's threads compute the next step on.
        """
        pointer = self._lib.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(pointer, shape=(rows, self._model.vocab))


class _Columns:
    """A batch's columns as arrays, so that filling them costs Python next to nothing."""

    def __init__(self, batch: Any, size: int):
        self._token, self._pos, self._count, self._wanted = (
            np.ctypeslib.as_array(column, shape=(size,))
            for column in (batch.token, batch.pos, batch.n_seq_id, batch.logits)
        )
        self._sequence = [np.ctypeslib.as_array(batch.seq_id[row], shape=(1,)) for row in range(size)]
        self._count[:] = 1

    def set_run(self, ids: Sequence[int], position: int, sequence: int, last: bool, row: int = 0) -> None:
        """Consecutive tokens of one sequence, from a row on; the logits of the last one where it is the prompt's last."""
        end = row + len(ids)
        self._token[row:end] = ids
        self._pos[row:end] = np.arange(position, position + len(ids))
        for at in range(row, end):
            self._sequence[at][0] = sequence
        self._wanted[row:end] = 0
        self._wanted[end - 1] = last

    def set_sequences(self, sequences: Sequence[int]) -> None:
        """A row for every one of these, with its logits."""
        for row, sequence in enumerate(sequences):
            self._sequence[row][0] = sequence
        self._wanted[: len(sequences)] = 1

    def set_tokens(self, tokens: np.ndarray, position: int) -> None:
        """The rows' next tokens, all at one position."""
        self._token[: len(tokens)] = tokens
        self._pos[: len(tokens)] = position
