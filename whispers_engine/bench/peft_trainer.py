"""Prompt tuning as its users run it: PEFT over transformers' model, stepped by transformers' Trainer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # a label that has no loss


class Text(NamedTuple):
    """One example as token ids."""

    context: list[int]
    header: list[int]
    answer: list[int]


class PeftTrainer:
    """A Trainer over a prompt-tuned model: frozen weights in the dtype of the contest, the soft prompt in float32.

    Args:
        folder: the base's.
        examples: of one length each, so that nothing is padded.
        soft: float32 `[m, hidden]`, what the soft prompt starts from.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        examples: Sequence[Text],
        soft: Tensor,
        batch: int,
        rate: float,
    ):
        from peft import PromptTuningConfig, get_peft_model
        from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(soft))
        self.model = get_peft_model(base, config)
        encoder: Any = self.model.prompt_encoder
        encoder["default"].embedding.weight.data.copy_(soft)
        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                ends[:] = []

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                ends.append(time.perf_counter())

        self._ends = ends
        self._work = tempfile.TemporaryDirectory()
        self._arguments: dict[str, Any] = {
            "output_dir": self._work.name,
            "per_device_train_batch_size": batch,
            "learning_rate": rate,
            "lr_scheduler_type": "linear",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": device.type == "cpu",
            "dataloader_pin_memory": device.type == "cuda",
        }
        rows = [_row(example) for example in examples]

        def trainer(steps: int) -> Any:
            arguments = TrainingArguments(**self._arguments, max_steps=steps)
            made = Trainer(self.model, arguments, train_dataset=rows, callbacks=[Clock()], data_collator=_stacked)
            made.remove_callback(PrinterCallback)  # which writes where the report goes
            return made

        self._trainer = trainer

    def run(self, steps: int) -> list[float]:
        """Milliseconds of each of so many steps, from the end of the one before: its batch is collated in that time too."""
        self._trainer(steps + 1).train()
        return [(after - before) * 1e3 for before, after in zip(self._ends, self._ends[1:], strict=False)]


def _row(example: Text) -> dict[str, list[int]]:
    ids = [*example.context, *example.header, *example.answer]
    return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - len(example.answer)) + example.answer}


def _stacked(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
