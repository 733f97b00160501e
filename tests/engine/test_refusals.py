"""What the engine refuses: always before any work, always saying what was found and what is accepted."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.conftest import Tiny, kv_prompt, make_tiny, soft_prompt
from whispers_engine import Committee, Engine, Expert, Request, SamplingParams, WhispersError
from whispers_engine.model import Model

LIMIT = 512  # the tiny models' max_position_embeddings
VOCAB = 320  # and their vocabulary
WIDTH = 64  # and their hidden size


@contextmanager
def refuses(*words: str, engine: Engine | None = None) -> Iterator[None]:
    """The block raises a WhispersError whose message has all the words, and nothing was computed, held or queued."""

    def forward(*_: Any) -> None:
        raise AssertionError("work was started")

    before = (engine.cache_stats(), engine.experts) if engine is not None else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "forward", forward)
        with pytest.raises(WhispersError) as caught:
            yield
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    if engine is not None:
        assert (engine.cache_stats(), engine.experts) == before
        assert not engine.busy


@pytest.fixture(scope="module")
def panel(llama: Tiny) -> Engine:
    """An engine with an expert of each placement; refusals leave it as it is, so that all tests share it."""
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=8192)
    engine.add_expert(soft_prompt(llama, 4, 1, "north", "suffix"))
    engine.add_expert(soft_prompt(llama, 4, 2, "south", "prefix"))
    engine.add_expert(kv_prompt(llama, 4, 3, "east", "detached"))
    return engine


# --- requests --------------------------------------------------------------------------------------------------------------------

ACCEPTED_QUESTION = ("accepted: a string", "chat messages", "token ids")
USER = {"role": "user", "content": "what do people eat"}

QUESTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "empty": ("", ("empty", *ACCEPTED_QUESTION)),
    "whitespace": (" \n\t ", ("empty", *ACCEPTED_QUESTION)),
    "empty list": ([], ("no tokens", *ACCEPTED_QUESTION)),
    "empty context": (([], [5]), ("context has no tokens", *ACCEPTED_QUESTION)),
    "a number": (5, ("a int", *ACCEPTED_QUESTION)),
    "None": (None, ("a NoneType", *ACCEPTED_QUESTION)),
    "bytes": (b"what do people eat", ("bytes", "accepted:")),
    "a tensor": (torch.tensor([5, 6]), ("a Tensor", *ACCEPTED_QUESTION)),
    "strings for ids": (("what", "assistant"), ("context ids: a str", "accepted: a list of token ids")),
    "list of strings": (["what", "else"], ("token id 'what'", f"integers in [0, {VOCAB})")),
    "id too large": ([5, VOCAB], (f"token id {VOCAB}", f"integers in [0, {VOCAB})")),
    "negative id": ([5, -1], ("token id -1", f"integers in [0, {VOCAB})")),
    "bool id": ([5, True], ("token id True", f"integers in [0, {VOCAB})")),
    "float id": ([5, 6.0], ("token id 6.0", f"integers in [0, {VOCAB})")),
    "bad header id": (([5], [VOCAB]), ("header ids", f"token id {VOCAB}", f"integers in [0, {VOCAB})")),
    "assistant last": ([USER, {"role": "assistant", "content": "rice"}], ("the last is", "rice", "accepted: a user turn")),
    "user turn empty": ([{"role": "user", "content": "  "}], ("the last is", "accepted: a user turn that is not empty")),
    "without content": ([{"role": "user"}], ("message {'role': 'user'}", "accepted: an object with the strings role and content")),
    "without role": ([{"content": "rice"}], ("message {'content': 'rice'}", "accepted:", "role and content")),
    "content a list": ([{"role": "user", "content": ["rice"]}], ("message", "['rice']", "accepted:", "strings")),
    "messages and ids": ([USER, 5], ("token id {", "accepted:")),
    "too long": (
        [5] * LIMIT,
        (f"{LIMIT + 4} tokens with soft prompt", "1 more for an answer", f"accepted: {LIMIT} in all", "max_position_embeddings"),
    ),
    "half a character": ("x\ud800", (r"question: the character '\ud800'", "accepted: valid Unicode text")),
    "half a character in messages": (
        [{"role": "system", "content": "\udcff"}, USER],
        (r"messages: the character '\udcff'", "accepted: valid Unicode text"),
    ),
    "far too long": ("rice " * LIMIT, ("more for an answer", f"accepted: {LIMIT} in all")),
}  # fmt: skip


@pytest.mark.parametrize("case", QUESTIONS)
def test_question(panel: Engine, case: str) -> None:
    question, words = QUESTIONS[case]
    for call in (
        lambda: panel.ask(question),
        lambda: panel.stream(question),  # at once, not with its first event
        lambda: panel.score(question, ["rice"]),
        lambda: panel.submit(Request(question)),
    ):
        with refuses(*words, engine=panel):
            call()


ACCEPTED_OPTIONS = "accepted: a list of strings or of lists of token ids, not empty"
NAMES = "north, south, east"

REQUESTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no options": ({"options": []}, ("options: []", ACCEPTED_OPTIONS)),
    "options a string": ({"options": "rice"}, ("options: 'rice'", ACCEPTED_OPTIONS)),
    "options a number": ({"options": 5}, ("options: 5", ACCEPTED_OPTIONS)),
    "empty option": ({"options": ["rice", ""]}, ("option ''", "no tokens", "accepted: a string or token ids, not empty")),
    "empty option ids": ({"options": [[5], []]}, ("option []", "no tokens", "accepted: a string or token ids, not empty")),
    "half a character as an option": (
        {"options": ["rice", "x\udcff"]},
        (r"'x\udcff': the character '\udcff'", "accepted: valid Unicode text"),
    ),
    "option out of range": ({"options": [[VOCAB]]}, (f"token id {VOCAB}", f"integers in [0, {VOCAB})")),
    "option a number": ({"options": [5]}, ("option: a int", "accepted: a list of token ids")),
    "option twice": ({"options": ["rice", "tea", "rice"]}, ("options names 'rice' twice; accepted: every option once",)),
    "option ids twice": ({"options": [[5], [5, 6], (5,)]}, ("options names (5,) twice", "[5]", "accepted: every option once")),
    "option too long": ({"options": ["rice", [5] * LIMIT]}, (f"{LIMIT} more for an answer", f"accepted: {LIMIT} in all")),
    "aggregation": ({"aggregate": "majority"}, ("aggregate: 'majority'", "accepted: vote, delegate, mixture, product, compose")),
    "top_k 0": ({"top_k": 0}, ("top_k: 0", "accepted: an integer, at least 1")),
    "top_k 1.5": ({"top_k": 1.5}, ("top_k: 1.5", "accepted: an integer, at least 1")),
    "profile without router": ({"profile": {"country": "Japan"}}, ("profile: no router could read it", "accepted: None")),
    "sampling a dict": ({"sampling": {"temperature": 1.0}}, ("sampling: a dict", "accepted: SamplingParams")),
    "unknown expert": ({"experts": ["north", "west"]}, ("expert 'west' is not in this committee", f"accepted: {NAMES}")),
    "base by name": ({"experts": ["base"]}, ("expert 'base' is not in this committee", f"accepted: {NAMES}")),
    "experts a string": ({"experts": "north"}, ("experts: the string 'north'", "accepted: a list of names")),
    "experts a number": ({"experts": 5}, ("experts", "5", "accepted: a list of names")),
    "experts of lists": ({"experts": [["north"]]}, ("['north']", "accepted:")),
    "expert twice": ({"experts": ["north", "south", "north"]}, ("names one twice", "accepted: every name once")),
    "all weights 0": ({"experts": {"north": 0, "south": 0.0}}, ("all weights are 0", "accepted: at least one above 0")),
    "negative weight": ({"experts": {"north": 1, "south": -0.5}}, ("'south'", "weight -0.5", "accepted: a finite number, at least 0")),
    "NaN weight": ({"experts": {"north": math.nan}}, ("'north'", "weight nan", "accepted: a finite number, at least 0")),
    "infinite weight": ({"experts": {"north": math.inf}}, ("'north'", "weight inf", "accepted: a finite number, at least 0")),
    "weight beyond every float": ({"experts": {"north": 10**400}}, ("'north'", "weight 1000", "accepted: a finite number")),
    "weights beyond every float": (
        {"experts": {"north": 10**308, "south": 10**308, "east": 0.5}},
        ("no finite sum", "accepted: smaller ones"),
    ),
    "weight a string": ({"experts": {"north": "1"}}, ("'north'", "weight '1'", "accepted: a finite number, at least 0")),
    "weights without a sum": ({"experts": {"north": 1e308, "south": 1e308}}, ("1e+308", "accepted:")),
}  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS)
def test_request(panel: Engine, case: str) -> None:
    fields, words = REQUESTS[case]
    sampling = {"sampling": SamplingParams(max_tokens=4)}
    for call in (
        lambda: panel.ask("what", **{**sampling, **fields}),
        lambda: panel.stream("what", **{**sampling, **fields}),
        lambda: panel.submit(Request("what", **{**sampling, **fields})),
    ):
        with refuses(*words, engine=panel):
            call()


@pytest.mark.parametrize("case", [name for name in REQUESTS if "option" in name or "expert" in name])
def test_score(panel: Engine, case: str) -> None:
    fields, words = REQUESTS[case]
    with refuses(*words, engine=panel):
        panel.score("what", **{"options": ["rice"], **fields})


def test_score_without_options(panel: Engine) -> None:
    with refuses("options: None", ACCEPTED_OPTIONS, engine=panel):
        panel.score("what", None)  # type: ignore[arg-type]


def test_the_engine_still_answers(panel: Engine) -> None:
    """After a refusal, the same call with good input works: nothing was left behind."""
    with refuses("accepted", engine=panel):
        panel.ask("")
    answer = panel.ask("what do people eat", sampling=SamplingParams(max_tokens=2))
    assert [record.expert for record in answer.experts] == panel.experts


def test_more_experts_than_branches(llama: Tiny) -> None:
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=512, max_num_seqs=2)
    for seed, name in enumerate(("a", "b", "c")):
        engine.add_expert(soft_prompt(llama, 2, seed, name, "suffix"))
    with refuses("experts: 3 at once", "accepted: max_num_seqs=2", engine=engine):
        engine.ask("what")


def test_pool_too_small_for_a_request(llama: Tiny) -> None:
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=64)
    engine.add_expert(soft_prompt(llama, 16, 1, "front", "detached"))  # pins two of the eight pages
    words = (
        "page pool is too small",
        "pages of 8",
        "6 are not pinned",
        "accepted: fewer experts, a smaller max_tokens",
    )
    with refuses("can take 7 pages", *words, engine=engine):
        engine.ask(([5] * 48, [6]), experts=[], sampling=SamplingParams(max_tokens=1))
    with refuses(*words, engine=engine):
        engine.score(([5] * 30, [6]), [[7] * 10, [8] * 10], experts=["front"])


def test_pool_too_small_to_pin(llama: Tiny) -> None:
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=16)
    for expert in (soft_prompt(llama, 17, 1, "wide", "prefix"), kv_prompt(llama, 17, 1, "deep", "detached")):
        with refuses("too small to pin 1 soft prompts", "3 pages of 8 needed", "2 of 2 free", engine=engine):
            engine.add_expert(expert)


SAMPLING: dict[str, tuple[dict[str, Any], str]] = {
    "temperature negative": ({"temperature": -0.1}, "a finite number, at least 0"),
    "temperature NaN": ({"temperature": math.nan}, "a finite number, at least 0"),
    "temperature infinite": ({"temperature": math.inf}, "a finite number, at least 0"),
    "temperature beyond every float": ({"temperature": 10**400}, "a finite number, at least 0"),
    "temperature a bool": ({"temperature": True}, "a finite number, at least 0"),
    "temperature a string": ({"temperature": "1"}, "a finite number, at least 0"),
    "top_p 0": ({"top_p": 0.0}, "above 0, at most 1"),
    "top_p above 1": ({"top_p": 1.01}, "above 0, at most 1"),
    "top_p NaN": ({"top_p": math.nan}, "above 0, at most 1"),
    "top_k negative": ({"top_k": -1}, "an integer, at least 0"),
    "top_k a fraction": ({"top_k": 2.5}, "an integer, at least 0"),
    "seed negative": ({"seed": -1}, "None or 0 to 2^64 - 1"),
    "seed too large": ({"seed": 2**64}, "None or 0 to 2^64 - 1"),
    "seed a fraction": ({"seed": 0.5}, "None or 0 to 2^64 - 1"),
    "max_tokens 0": ({"max_tokens": 0}, "an integer, at least 1"),
    "max_tokens a fraction": ({"max_tokens": 1.5}, "an integer, at least 1"),
    "stop with an empty string": ({"stop": ["end", ""]}, "strings, none empty"),
    "stop of numbers": ({"stop": [5]}, "strings, none empty"),
    "stop a number": ({"stop": 5}, "strings, none empty"),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling(case: str) -> None:
    fields, accepted = SAMPLING[case]
    name, value = next(iter(fields.items()))
    with refuses(f"sampling: {name} ", repr(value).strip("[]"), f"accepted: {accepted}"):
        SamplingParams(**fields)


# --- the engine's settings -------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dtype": ({"dtype": "float8"}, ("dtype: 'float8'", "accepted: auto, float32, bfloat16, float16")),
    "device": ({"device": "abacus"}, ("device: 'abacus'", "accepted: auto, cpu, cuda")),
    "device that is no device": ({"device": "meta"}, ("device: 'meta' is not available here", "accepted: auto, cpu")),
    "impl unknown": ({"impl": "nonsense"}, ("'nonsense'", "accepted: auto, ")),
    "quantization": ({"quantization": "int4"}, ("quantization: 'int4'", "accepted: None, or 'int8'")),
    "kv_cache_dtype": ({"kv_cache_dtype": "fp8"}, ("kv_cache_dtype: 'fp8' is not available", "accepted: 'auto'")),
    "tensor_parallel_size": ({"tensor_parallel_size": 2}, ("tensor_parallel_size: 2 is not available", "accepted: 1")),
    "page_size 0": ({"page_size": 0}, ("page_size: 0", "accepted: an integer, at least 1")),
    "page_size a fraction": ({"page_size": 8.0}, ("page_size: 8.0", "accepted: an integer, at least 1")),
    "max_num_seqs 0": ({"max_num_seqs": 0}, ("max_num_seqs: 0", "accepted: an integer, at least 1")),
    "max_num_batched_tokens 0": ({"max_num_batched_tokens": 0}, ("max_num_batched_tokens: 0", "accepted: an integer, at least 1")),
    "pool below a page": ({"kv_cache_tokens": 7, "page_size": 8}, ("kv_cache_tokens: 7", "accepted: an integer, at least 8")),
    "pool beyond all memory": ({"kv_cache_tokens": 10**14}, ("kv_cache_tokens: 100000000000000", "accepted: what cpu has memory for")),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_setting(llama: Tiny, case: str) -> None:
    settings, words = SETTINGS[case]
    with refuses(*words):
        Engine(llama.folder, **settings)


def test_a_named_implementation_never_falls_back(llama: Tiny) -> None:
    """Of the known names, one works or is refused; nothing is put in its place."""
    from whispers_kernels.ops import available_impls

    for impl in {"reference", "triton", "cpp"} - set(available_impls()):
        with refuses(f"impl={impl!r} is not available here", "accepted: auto, "):
            Engine(llama.folder, impl=impl)
    assert Engine(llama.folder, impl="reference").model.impl == "reference"


# --- a base's folder -------------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> Callable[[Path], None]:
    """Edits config.json."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def end_tokens(in_config: Any, in_generation: Any) -> Callable[[Path], None]:
    """Sets eos_token_id in config.json and generation_config.json."""

    def edit(folder: Path) -> None:
        for name, value in (("config.json", in_config), ("generation_config.json", in_generation)):
            path = folder / name
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": value}))

    return edit


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edits the tensors."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        values = load_file(path)
        change(values)
        save_file(values, path)

    return edit


def sharded(**where: str) -> Callable[[Path], None]:
    """Turns the one file into a first shard and an index that names it, or whatever else, for every tensor."""

    def edit(folder: Path) -> None:
        single = folder / "model.safetensors"
        names = dict.fromkeys(load_file(single), "model-00001-of-00002.safetensors")
        (folder.parent / "outside.safetensors").write_bytes(single.read_bytes())
        single.rename(folder / "model-00001-of-00002.safetensors")
        index = {"weight_map": {**names, **where}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


def index_without_a_map(folder: Path) -> None:
    sharded()(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model-00001-of-00002.safetensors"]}')


def pickled(folder: Path) -> None:
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


def pickle_by_another_name(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"model.norm.weight": [1.0] * WIDTH}))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without(*names: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return edit


def eight_bits(values: dict[str, Any]) -> None:
    values["model.norm.weight"] = values["model.norm.weight"].to(torch.float8_e4m3fn)


def another_head(values: dict[str, Any]) -> None:
    values["lm_head.weight"] = values["model.embed_tokens.weight"].flip(0).contiguous()


def three_kv_heads(folder: Path) -> None:
    """Four query heads on three: every tensor has the shape that the config asks for."""

    def widen(values: dict[str, Any]) -> None:
        for name in [name for name in values if ".k_proj." in name or ".v_proj." in name]:
            values[name] = torch.cat([values[name], values[name]])[: 3 * 16].contiguous()

    config(num_key_value_heads=3)(folder)
    tensors(widen)(folder)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
END_TOKENS = f"accepted: null, an integer in [0, {VOCAB}) or a list of them"
FAMILIES = "accepted: llama, mistral, qwen2, qwen3"
WEIGHTS = "accepted: model.safetensors, or its index and shards"
OUT = "model.layers.1.self_attn.o_proj.weight"
LATE_SHARD = "model-00002-of-00002.safetensors"

BASES: dict[str, tuple[str, Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": ("llama", without("config.json"), ("no config.json", "accepted: a Hugging Face folder")),
    "config not JSON": ("llama", lambda at: (at / "config.json").write_text("{"), ("config.json", "cannot be read as JSON")),
    "config a list": ("llama", lambda at: (at / "config.json").write_text("[]"), ("holds a JSON list", "accepted: an object")),
    "config contradicts itself": ("llama", config(hidden_size="wide"), ("config.json", "transformers cannot read it", "hidden_size")),
    "gpt2": ("llama", lambda at: (at / "config.json").write_text('{"model_type": "gpt2"}'), ("model_type 'gpt2'", FAMILIES)),
    "no family": ("llama", config(model_type=None), ("model_type None", FAMILIES)),
    "mistral's window": ("mistral", config(sliding_window=128), ("sliding_window 128", "accepted: no active window")),
    "qwen2's window": (
        "qwen2",
        config(use_sliding_window=True, sliding_window=128, max_window_layers=1, layer_types=None),
        ("sliding_window 128", "accepted: no active window"),
    ),
    "a window on one of qwen3's layers": (
        "qwen3",
        config(use_sliding_window=True, sliding_window=LIMIT - 1, layer_types=["full_attention", "sliding_attention", "full_attention"]),
        (f"sliding_window {LIMIT - 1}", f"accepted: no active window, that is null or at least max_position_embeddings {LIMIT}"),
    ),
    "chunked attention": (
        "qwen2",
        config(layer_types=["chunked_attention"] * 3),
        ("layer_types ['chunked_attention']", "accepted: full_attention, sliding_attention"),
    ),
    "llama's sliding layers": (
        "llama",
        config(layer_types=["sliding_attention"] * 3),
        ("layer_types ['sliding_attention']", "accepted: full_attention"),
    ),
    "seeing what follows": ("llama", config(is_causal=False), ("config.json: is_causal False", "accepted: true")),
    "layers of their own": (
        "llama",
        config(per_layer_config={"1": {"rms_norm_eps": 0.5}}),
        ("config.json: per_layer_config {'1': {'rms_norm_eps': 0.5}}", "accepted: none"),
    ),
    **{
        f"end token {eos!r}": ("llama", end_tokens(2, eos), (f"generation_config.json: eos_token_id {eos!r}", END_TOKENS))
        for eos in ("2", [[2]], True, [2, True], 2.0, {"id": 2}, -1, VOCAB, [2, VOCAB])
    },
    "end token beyond the vocabulary in config.json": (
        "llama",
        end_tokens([2, VOCAB], None),
        (f"/config.json: eos_token_id [2, {VOCAB}]", END_TOKENS),
    ),
    "end token a string in config.json": ("llama", end_tokens("2", None), ("/config.json", "eos_token_id", "'2'", "int")),
    "yarn": ("llama", config(rope_parameters=YARN), ("rope_type 'yarn'", "accepted: default, linear, llama3")),
    "partial rotary": (
        "llama",
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("partial_rotary_factor 0.5", "accepted: 1.0"),
    ),
    "gelu": ("llama", config(hidden_act="gelu"), ("hidden_act 'gelu'", "accepted: silu")),
    "quantised": (
        "llama",
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ("quantization_config", "gptq", "accepted: float32, bfloat16 or float16 weights"),
    ),
    "heads that do not divide": ("llama", three_kv_heads, ("num_key_value_heads", "3", "accepted:")),
    "stored as float64": ("llama", config(dtype="float64"), ("dtype 'float64'", "accepted: float32, bfloat16, float16")),
    "eight-bit tensor": ("llama", tensors(eight_bits), ("model.norm.weight", "float8", "accepted: float32, bfloat16, float16")),
    "integer tensor": (
        "llama",
        tensors(lambda values: values.update({"model.norm.weight": torch.ones(WIDTH, dtype=torch.int64)})),
        ("model.norm.weight", "int64", "accepted: float32, bfloat16, float16"),
    ),
    "missing tensor": ("llama", tensors(lambda values: values.pop(OUT)), (OUT, "missing", "config.json asks for it, [64, 64]")),
    "missing head": ("llama", tensors(lambda values: values.pop("lm_head.weight")), ("lm_head.weight", "missing", "[320, 64]")),
    "missing embeddings": (
        "llama",
        tensors(lambda values: values.pop("model.embed_tokens.weight")),  # its head is there, but is not tied to them
        ("model.embed_tokens.weight", "missing", "[320, 64]"),
    ),
    "missing embeddings and head": ("qwen2", tensors(lambda values: values.pop("model.embed_tokens.weight")), ("missing", "[320, 64]")),
    "a head of its own though tied": (
        "qwen2",
        tensors(another_head),
        ("tie_word_embeddings true", "'lm_head.weight' differs", "accepted: tie_word_embeddings false", "or a file without"),
    ),
    "missing bias": ("qwen2", tensors(lambda values: values.pop("model.layers.0.self_attn.k_proj.bias")), ("k_proj.bias", "missing")),
    "missing q norm": ("qwen3", tensors(lambda values: values.pop("model.layers.0.self_attn.q_norm.weight")), ("q_norm", "missing")),
    "wrong shape": (
        "llama",
        tensors(lambda values: values.update({OUT: torch.zeros(64, 48)})),
        (OUT, "is [64, 48]", "config.json asks for [64, 64]"),
    ),
    "fewer layers than the config says": ("llama", config(num_hidden_layers=4), ("model.layers.3", "missing", "config.json asks")),
    "missing shard": (
        "llama",
        sharded(**{OUT: LATE_SHARD}),
        ("model.safetensors.index.json", f"shard {LATE_SHARD!r}", "not in"),
    ),
    "shard outside": ("llama", sharded(**{OUT: "../outside.safetensors"}), ("index.json", "outside.safetensors", "not in")),
    "index without a map": ("llama", index_without_a_map, ("index.json", "weight_map", "accepted:")),
    "pickle": ("llama", pickled, ("pickles (pytorch_model.bin)", "never read", WEIGHTS)),
    "pickle by another name": ("llama", pickle_by_another_name, ("model.safetensors", "not a safetensors file")),
    "cut off": ("llama", cut, ("model.safetensors", "not a safetensors file")),
    "no weights": ("llama", without("model.safetensors"), ("holds no weights", WEIGHTS)),
    "no tokenizer": ("llama", without("tokenizer.json", "tokenizer_config.json"), ("no tokenizer",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole folder of each family."""
    made = {name: make_tiny(name, tmp_path_factory.mktemp(name)).folder for name in ("mistral", "qwen2", "qwen3")}
    return {"llama": llama.folder, **made}


@pytest.mark.parametrize("case", BASES)
def test_base(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    family, edit, words = BASES[case]
    folder = tmp_path / "model"
    shutil.copytree(bases[family], folder)
    edit(folder)
    with refuses(*words):
        Engine(folder)


def test_windows_that_are_not_active_are_accepted(bases: dict[str, Path], tmp_path: Path) -> None:
    """The counterpart: a window no shorter than the longest context, or one that is switched off, or on no layer."""
    for family, edit in (
        ("mistral", config(sliding_window=LIMIT)),
        ("qwen2", config(use_sliding_window=False, sliding_window=128)),
        ("qwen3", config(use_sliding_window=True, sliding_window=128, max_window_layers=3, layer_types=None)),
    ):
        folder = tmp_path / family
        shutil.copytree(bases[family], folder)
        edit(folder)
        assert Engine(folder).model.config.family == family


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/nonexistent/base", ("'/nonexistent/base' is no folder here", "accepted: a local folder, a hub id")),
        ("./base", ("'./base' is no folder here", "accepted: a local folder, a hub id")),
        ("no-such-base", ("'no-such-base' is no folder here", "smollm2-135m-instruct")),
        (Path("org/name"), ("is no folder here", "accepted: a local folder")),
    ],
)
def test_model_that_is_not_there(model: str | Path, words: tuple[str, ...]) -> None:
    with refuses(*words):
        Engine(model)


def test_model_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client raises many types; one message says why."""
    import huggingface_hub

    def refused(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with refuses("'org/name' is no folder here", "could not be had from the hub: no route to the hub"):
        Engine("org/name")


def test_string_question_without_a_template(llama: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama.folder, folder)
    (folder / "chat_template.jinja").unlink()
    engine = Engine(folder, page_size=8, kv_cache_tokens=512)
    for question in ("what do people eat", [USER]):
        with refuses("no chat template", "accepted: token ids, or a base with a chat template", engine=engine):
            engine.ask(question)
    assert engine.score([5, 6], [[7]]).logprobs.isfinite().all()


def test_messages_that_the_template_refuses(llama: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama.folder, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns here') }}")
    engine = Engine(folder, page_size=8, kv_cache_tokens=512)
    with refuses("chat template refuses", "no system turns here", engine=engine):
        engine.ask("what")


def test_tokens_beyond_the_vocabulary(llama: Tiny, tmp_path: Path) -> None:
    """A tokenizer that knows more tokens than the base: their ids would be read as rows of some expert's soft prompt."""
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(llama.folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    engine = Engine(folder, page_size=8, kv_cache_tokens=512)
    engine.add_expert(soft_prompt(llama, 4, 1, "north", "suffix"))
    for call in (lambda: engine.ask("what is <extra>"), lambda: engine.score([5, 6], ["<extra>"])):
        with refuses(f"token id {VOCAB}", f"integers in [0, {VOCAB})", engine=engine):
            call()
    with refuses(f"token id {VOCAB}", f"integers in [0, {VOCAB})", engine=engine):
        Expert.from_text("south", "<extra>", engine)


# --- experts ---------------------------------------------------------------------------------------------------------------------


def spoilt(value: float) -> torch.Tensor:
    values = torch.zeros(3, WIDTH)
    values[1, 5] = value
    return values


NAME = "accepted are 1 to 64 of the characters A-Z a-z 0-9 _ . -"
EMBEDDINGS = "accepted: [m, hidden] of a float dtype"
KV = "accepted: [layers, 2, kv_heads, m, head_dim] of a float dtype"

EXPERTS: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "NaN": (("e", spoilt(math.nan)), ("expert 'e'", "1 values are NaN or infinite", "accepted: finite values")),
    "infinite": (("e", spoilt(math.inf)), ("1 values are NaN or infinite", "accepted: finite values")),
    "beyond float32": (("e", spoilt(1.0).double() * 1e300), ("1 values are NaN or infinite", "accepted: finite values")),
    "one dimension": (("e", torch.zeros(WIDTH)), ("embeddings [64]", EMBEDDINGS)),
    "no rows": (("e", torch.zeros(0, WIDTH)), ("embeddings [0, 64]", EMBEDDINGS)),
    "integers": (("e", torch.zeros(3, WIDTH, dtype=torch.int64)), ("torch.int64", EMBEDDINGS)),
    "no tensor": (("e", np.zeros((3, WIDTH), np.float32)), ("expert 'e'", "ndarray", "accepted:")),
    "kv of two dimensions": (("e", torch.zeros(3, WIDTH), "prefix", "kv"), ("embeddings [3, 64]", KV)),
    "kv without values": (("e", torch.zeros(3, 1, 2, 4, 16), "prefix", "kv"), ("[3, 1, 2, 4, 16]", KV)),
    "kind": (("e", torch.zeros(3, WIDTH), "suffix", "lora"), ("kind 'lora'", "accepted: embeddings, kv")),
    "placement": (("e", torch.zeros(3, WIDTH), "infix"), ("placement 'infix'", "accepted: prefix, suffix, detached")),
    "suffix kv": (
        ("e", torch.zeros(3, 2, 2, 4, 16), "suffix", "kv"),
        ("placement 'suffix' of kind 'kv'", "accepted: prefix, detached"),
    ),
    **{
        f"name {name!r}": ((name, torch.zeros(3, WIDTH)), (f"expert name {name!r}", NAME, "not 'base'"))
        for name in ("../x", "base", "", "a/b", ".", "..", ".hidden", "a b", "x" * 65, "a\n", 5, None)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", EXPERTS)
def test_expert(case: str) -> None:
    arguments, words = EXPERTS[case]
    with refuses(*words):
        Expert(*arguments)


MISFITS: dict[str, tuple[Expert, tuple[str, ...]]] = {
    "wrong base": (Expert("e", torch.zeros(3, WIDTH), base="0" * 32), ("made for the base " + "0" * 32, "fingerprint is ")),
    "wrong width": (Expert("e", torch.zeros(3, WIDTH + 1)), ("width [65]", "this base has [64]")),
    "kv of other depth": (Expert("e", torch.zeros(2, 2, 2, 4, 16), "prefix", "kv"), ("[2, 2, 16]", "this base has [3, 2, 16]")),
    "kv of other heads": (Expert("e", torch.zeros(3, 2, 4, 4, 16), "prefix", "kv"), ("[3, 4, 16]", "this base has [3, 2, 16]")),
    "kv of other width": (Expert("e", torch.zeros(3, 2, 2, 4, 8), "detached", "kv"), ("[3, 2, 8]", "this base has [3, 2, 16]")),
    "no room for a question": (
        Expert("e", torch.zeros(LIMIT - 1, WIDTH)),
        (f"expert 'e': {LIMIT - 1} virtual tokens", f"accepted: at most {LIMIT - 2}", f"max_position_embeddings {LIMIT}"),
    ),
    "kv without room for a question": (
        Expert("e", torch.zeros(3, 2, 2, LIMIT, 16), "detached", "kv"),
        (f"expert 'e': {LIMIT} virtual tokens", f"accepted: at most {LIMIT - 2}"),
    ),
    "name taken": (Expert("north", torch.zeros(3, WIDTH)), ("'north'", "name is taken", "accepted: one not in")),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_expert_that_does_not_fit(panel: Engine, case: str) -> None:
    expert, words = MISFITS[case]
    with refuses(*words, engine=panel):
        panel.add_expert(expert)


def test_values_that_the_engine_dtype_cannot_hold(llama: Tiny) -> None:
    """Finite in float32, infinite in float16: the answers would be NaN."""
    engine = Engine(llama.folder, dtype="float16", page_size=8, kv_cache_tokens=512)
    deep = Expert("deep", torch.full((3, 2, 2, 4, 16), 1e6), "detached", "kv")
    for expert in (Expert("wide", torch.full((3, WIDTH), 1e6)), deep):
        with refuses(expert.name, "float16", engine=engine):
            engine.add_expert(expert)


def test_unknown_names(panel: Engine) -> None:
    for call in (lambda: panel.remove_expert("west"), lambda: panel.expert("west")):
        with refuses("expert 'west' is not in this committee", f"accepted: {NAMES}", engine=panel):
            call()


# --- folders of experts ----------------------------------------------------------------------------------------------------------


def rewrite(path: str, **changes: Any) -> Callable[[Path], None]:
    """Edits a JSON file of the expert's folder; None takes a key out."""

    def edit(folder: Path) -> None:
        found = {**json.loads((folder / path).read_text()), **changes}
        kept = {key: value for key, value in found.items() if value is not None}
        (folder / path).write_text(json.dumps(kept))

    return edit


def adapter(values: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: save_file(values, folder / "adapter_model.safetensors")


def adapter_pickled(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


def adapter_cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


KEY = "accepted: prompt_embeddings of two dimensions alone"

FOLDERS: dict[str, tuple[str, Callable[[Path], Any], tuple[str, ...]]] = {
    "LoRA": ("embeddings", rewrite("adapter_config.json", peft_type="LORA"),
        ("peft_type 'LORA'", "accepted: PROMPT_TUNING, PREFIX_TUNING")),
    "encoder and decoder": (
        "embeddings",
        rewrite("adapter_config.json", num_transformer_submodules=2),
        ("num_transformer_submodules 2", "accepted: 1"),
    ),
    "no adapter_config": (
        "embeddings",
        without("adapter_config.json"),
        ("fresh/adapter_config.json: cannot be read: No such file or directory; accepted: a file that holds a JSON object",),
    ),
    "no expert.json": ("embeddings", without("expert.json"), ("fresh/expert.json: cannot be read: No such file or directory; accepted",)),
    "pickle": ("embeddings", adapter_pickled, ("the pickle adapter_model.bin", "never read", "accepted: adapter_model.safetensors")),
    "no tensors": ("embeddings", without("adapter_model.safetensors"), ("no adapter_model.safetensors", "accepted:")),
    "cut off": ("embeddings", adapter_cut, ("adapter_model.safetensors", "not a safetensors file")),
    "another key": ("embeddings", adapter({"lora_A": torch.zeros(4, WIDTH)}), ("lora_A [4, 64]", KEY)),
    "a second key": (
        "embeddings",
        adapter({"prompt_embeddings": torch.zeros(4, WIDTH), "head": torch.zeros(2)}),
        ("head [2]", KEY),
    ),
    "three dimensions": ("embeddings", adapter({"prompt_embeddings": torch.zeros(1, 4, WIDTH)}), ("[1, 4, 64]", KEY)),
    "NaN": ("embeddings", adapter({"prompt_embeddings": torch.full((4, WIDTH), math.nan)}), ("256 values are NaN or infinite",)),
    "no placement": ("embeddings", rewrite("expert.json", placement=None), ("expert.json", "without placement")),
    "bad placement": ("embeddings", rewrite("expert.json", placement="infix"), ("placement 'infix'", "accepted:")),
    "kind contradicted": ("embeddings", rewrite("expert.json", kind="kv"), ("says kind 'kv'", "the adapter is 'embeddings'")),
    "record a string": ("embeddings", rewrite("expert.json", record="by hand"), ("expert.json", "record", "accepted:")),
    "culture a number": ("embeddings", rewrite("expert.json", culture=5), ("expert.json", "culture", "accepted:")),
    "base a number": ("embeddings", rewrite("expert.json", base=5), ("base",)),
    "rows that the config denies": (
        "embeddings",
        rewrite("adapter_config.json", num_virtual_tokens=9),
        ("prompt_embeddings [4, 64]", "num_virtual_tokens"),
    ),
    "kv without num_layers": ("kv", rewrite("adapter_config.json", num_layers=None), ("prompt_embeddings [4, 192]", "num_layers")),
    "kv that does not fit": ("kv", rewrite("adapter_config.json", num_layers=7), ("[4, 192]", "does not fit", "num_layers, token_dim")),
    "kv of no heads": ("kv", rewrite("adapter_config.json", num_attention_heads=0), ("[4, 192]", "num_attention_heads")),
    "kv rows that the config denies": ("kv", rewrite("adapter_config.json", num_virtual_tokens=9), ("[4, 192]", "num_virtual_tokens")),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_expert_folder(llama: Tiny, engine: Engine, tmp_path: Path, case: str) -> None:
    kind, edit, words = FOLDERS[case]
    maker = soft_prompt if kind == "embeddings" else kv_prompt
    maker(llama, 4, 1, "fresh", "prefix").save(tmp_path / "fresh")
    assert Expert.load(tmp_path / "fresh").name == "fresh"
    edit(tmp_path / "fresh")
    with refuses(*words, engine=engine):
        engine.add_expert(tmp_path / "fresh")


# --- committees ------------------------------------------------------------------------------------------------------------------


def listed(*names: Any) -> Callable[[Path], None]:
    return rewrite("committee.json", experts=list(names))


def linked_outside(folder: Path) -> None:
    (folder / "north").rename(folder.parent / "elsewhere")
    (folder / "north").symlink_to(folder.parent / "elsewhere", target_is_directory=True)


def renamed(folder: Path) -> None:
    rewrite("expert.json", name="other")(folder / "north")


COMMITTEES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "none": (without("committee.json"), ("no committee.json", "accepted: a committee's folder")),
    "not JSON": (lambda at: (at / "committee.json").write_text("experts: [north]"), ("committee.json", "cannot be read as JSON")),
    "not UTF-8": (lambda at: (at / "committee.json").write_bytes(b"\xff\xfe"), ("committee.json", "cannot be read as JSON")),
    "not an object": (lambda at: (at / "committee.json").write_text('["north"]'), ("holds a JSON list", "accepted: an object")),
    "another version": (rewrite("committee.json", version=2), ("version 2", "accepted: 1")),
    "no version": (rewrite("committee.json", version=None), ("version None", "accepted: 1")),
    "another base": (
        rewrite("committee.json", base={"name": "other", "fingerprint": "0" * 32}),
        ("made for the base other (" + "0" * 32, "is "),
    ),
    "no fingerprint": (rewrite("committee.json", base={"name": "other"}),
        ("base {'name'", "accepted: an object with name and fingerprint")),
    "experts an object": (rewrite("committee.json", experts={"north": 1}), ("experts {'north': 1}", "accepted: a list of names")),
    "an expert twice": (listed("north", "south", "north"), ("['north', 'south', 'north']", "none twice")),
    "a name outside": (listed("north", "../outside"), ("expert name '../outside'", NAME)),
    "an absolute name": (listed("north", "/tmp"), ("expert name '/tmp'", NAME)),
    "a number": (listed("north", 5), ("expert name 5", NAME)),
    "a link outside": (linked_outside, ("leads out of the committee's folder", "elsewhere")),
    "an expert by another name": (renamed, ("north", "its expert.json names 'other'")),
    "an expert that is not there": (listed("north", "west"), ("west", "expert.json", "cannot be read")),
    "an expert for another base": (
        lambda at: rewrite("expert.json", base="0" * 32)(at / "south"),
        ("expert 'south': made for the base " + "0" * 32, "this base's fingerprint"),
    ),
    "an expert's NaN": (
        lambda at: adapter({"prompt_embeddings": torch.full((4, WIDTH), math.nan)})(at / "south"),
        ("expert 'south'", "NaN or infinite", "accepted: finite values"),
    ),
    "an expert of another width": (
        lambda at: (
            adapter({"prompt_embeddings": torch.zeros(4, 32)})(at / "south"),
            rewrite("adapter_config.json", token_dim=32)(at / "south"),
        ),
        ("expert 'south': width [32]", "this base has [64]"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def committee(llama: Tiny, panel: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole committee of two."""
    folder = tmp_path_factory.mktemp("committees") / "whole"
    for name in ("north", "south"):
        Committee.add(folder, panel.expert(name), str(llama.folder), panel.fingerprint)
    return folder


@pytest.mark.parametrize("case", COMMITTEES)
def test_committee(llama: Tiny, committee: Path, tmp_path: Path, case: str) -> None:
    edit, words = COMMITTEES[case]
    folder = tmp_path / "committee"
    shutil.copytree(committee, folder)
    assert len(Committee.load(folder).experts) == 2
    edit(folder)
    with refuses(*words):
        Engine(llama.folder, folder)


def test_committee_of_another_base(committee: Path, bases: dict[str, Path]) -> None:
    with refuses("made for the base", "llama", str(bases["qwen2"]), "is "):
        Engine(bases["qwen2"], committee)


def test_committee_too_large_for_the_pool(llama: Tiny, committee: Path) -> None:
    """All or none: `south` (prefix) has to be pinned, one page has no room for two pages of it."""
    with refuses("too small to pin 1 soft prompts", "2 pages of 2 needed", "1 of 1 free"):
        Engine(llama.folder, committee, page_size=2, kv_cache_tokens=2)


def test_adding_to_another_bases_committee(llama: Tiny, committee: Path) -> None:
    before = sorted(committee.rglob("*"))
    with refuses("a committee for the base", "the expert is for " + "0" * 32):
        Committee.add(committee, soft_prompt(llama, 4, 1, "late", "suffix"), "other", "0" * 32)
    assert sorted(committee.rglob("*")) == before


def test_adding_an_expert_of_another_base(llama: Tiny, panel: Engine, committee: Path) -> None:
    """It would make the whole committee one that no engine loads."""
    before = sorted(committee.rglob("*"))
    expert = Expert("late", torch.zeros(4, WIDTH), base="0" * 32)
    with refuses("0" * 32, panel.fingerprint):
        Committee.add(committee, expert, str(llama.folder), panel.fingerprint)
    assert sorted(committee.rglob("*")) == before


def test_text_without_tokens(panel: Engine) -> None:
    with refuses("the text ''", "no tokens", engine=panel):
        Expert.from_text("empty", "", panel)
    with refuses("virtual_tokens 0", "accepted: at least 1", engine=panel):
        Expert.from_text("empty", "rice", panel, virtual_tokens=0)
    with refuses(f"{10**15} virtual tokens", f"accepted: at most {LIMIT - 2}", engine=panel):
        Expert.from_text("endless", "rice", panel, virtual_tokens=10**15)  # which no memory holds
    with refuses("expert name '../x'", NAME, engine=panel):
        Expert.from_text("../x", "rice", panel)
