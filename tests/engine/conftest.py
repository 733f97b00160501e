"""Tiny random models of the four families, made on the spot, and the engines over them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import whispers_engine.auto as auto_module
from whispers_engine import Engine, Expert
from whispers_engine.bench import measure
from whispers_engine.cli.main import run
from whispers_kernels import ops, reference

Bench = Callable[..., tuple[int, str]]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]
CORPUS = [
    "what do people eat for breakfast in the morning",
    "the people of many shores speak and we listen",
    "rice, bread, tea",
]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Tiny:
    """A saved random model: its folder, the transformers model itself (float32, eager), its tokenizer."""

    folder: Path
    hf: Any
    tokenizer: Any

    @property
    def vocab(self) -> int:
        return int(self.hf.config.vocab_size)

    @property
    def hidden(self) -> int:
        return int(self.hf.config.hidden_size)


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    return fast


FAMILIES: dict[str, Callable[..., Any]] = {
    # grouped-query attention 2, llama3 rope, biases everywhere, untied head
    "llama": lambda **kw: LlamaForCausalLM(
        LlamaConfig(
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters=LLAMA3_ROPE,
            attention_bias=True,
            mlp_bias=True,
            **kw,
        )
    ),
    # multi-query attention, linear rope, head_dim apart from hidden / heads
    "mistral": lambda **kw: MistralForCausalLM(
        MistralConfig(
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=24,
            sliding_window=None,
            rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
            **kw,
        )
    ),
    # no grouping, biases on q, k, v, tied head
    "qwen2": lambda **kw: Qwen2ForCausalLM(
        Qwen2Config(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, **kw)
    ),
    # q and k norms, 8 heads on one, of a size that tiles of bf16 take whole
    "qwen3": lambda **kw: Qwen3ForCausalLM(
        Qwen3Config(num_attention_heads=8, num_key_value_heads=1, head_dim=32, **kw)
    ),
}


def make_tiny(family: str, folder: Path, seed: int = 0, **save: Any) -> Tiny:
    """Saves a random model whose every weight matters: with transformers' usual initialisation all tokens are about as likely."""
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    hf = FAMILIES[family](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            spread = 0.3 if weight.dim() == 1 else 1.5 / weight.shape[1] ** 0.5
            weight.copy_(torch.randn_like(weight) * spread + (1.0 if "norm" in name else 0.0))
        hf.get_input_embeddings().weight.mul_(4.0 if not hf.config.tie_word_embeddings else 1.0)
    hf.eval().save_pretrained(folder, **save)
    hf.set_attn_implementation("eager")
    return Tiny(folder, hf, tokenizer)


@pytest.fixture(scope="session", params=list(FAMILIES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Each of the four families in turn."""
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """One family, for what does not depend on it."""
    return make_tiny("llama", tmp_path_factory.mktemp("llama-only"))


@pytest.fixture(autouse=True, scope="session")
def float32_by_default() -> Iterator[None]:
    """Results are compared with transformers to 1e-4, on processors that would compute in bfloat16 too."""
    choose = auto_module.auto_dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            auto_module,
            "auto_dtype",
            lambda device, impl, stored: torch.float32 if device.type == "cpu" else choose(device, impl, stored),
        )
        yield


@pytest.fixture
def engine(llama: Tiny) -> Engine:
    """A fresh engine with small pages, so that short contexts cross their borders."""
    return Engine(llama.folder, page_size=8, kv_cache_tokens=8192)


def soft_prompt(tiny: Tiny, m: int, seed: int, name: str, placement: str) -> Expert:
    """A random expert of the embeddings' own size, so that it matters."""
    generator = torch.Generator().manual_seed(seed)
    scale = float(tiny.hf.get_input_embeddings().weight.detach().std())
    return Expert(name, torch.randn(m, tiny.hidden, generator=generator) * scale, placement)


def kv_prompt(tiny: Tiny, m: int, seed: int, name: str, placement: str) -> Expert:
    """A random kv expert."""
    config = tiny.hf.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_hidden_layers, 2, config.num_key_value_heads, m, dim)
    return Expert(name, torch.randn(shape, generator=generator), placement, kind="kv")


def token_ids(tiny: Tiny, length: int, seed: int) -> list[int]:
    """Random ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), tiny.vocab, (length,), generator=generator).tolist()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs a command line in this process, its samples as short as they can be; returns its status and what it printed."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setitem(measure._SAMPLE_MS, "cpu", 0.1)
    monkeypatch.setattr(measure, "_SPAN_CPU", 1 << 18)
    monkeypatch.setitem(measure._CEILING_SIZES, "cpu", (1 << 20, 64))

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["whispers", *arguments])
        with pytest.raises(SystemExit) as ended:
            run()
            raise SystemExit(0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return int(ended.value.code or 0), captured.out if ended.value.code in (
            0,
            None,
        ) or captured.out else captured.err

    return command


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Makes an implementation "planted" that is the reference but for one operation."""

    def plant(op: str, function: Callable[..., Any]) -> None:
        monkeypatch.setitem(ops._IMPLS, "planted", {**reference.IMPLS, op: function})

    return plant
