"""Experts from file to engine: kept whole, read from and by PEFT, made of text, gathered in committees, added and removed."""

from __future__ import annotations

import copy
import itertools
import json
import re
import resource
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import whispers_engine
import whispers_engine.experts as experts_module
from tests.engine.conftest import Tiny, kv_prompt, soft_prompt, token_ids
from tests.engine.oracle import oracle_logprobs
from tests.engine.test_router import random_router
from whispers_engine import Answer, Committee, Done, Engine, Expert, Finished, Request, SamplingParams, Token
from whispers_engine.errors import WhispersError
from whispers_engine.files import write_json
from whispers_engine.request import Event
from whispers_engine.training import checkpoint

TOLERANCE = 1e-4
CASES = [
    ("embeddings", "prefix"),
    ("embeddings", "suffix"),
    ("embeddings", "detached"),
    ("kv", "prefix"),
    ("kv", "detached"),
]
IDLE = {"pages_pinned": 0, "pages_context": 0, "pages_branch": 0}


def make_expert(tiny: Tiny, kind: str, placement: str, m: int = 5, seed: int = 1, name: str = "expert") -> Expert:
    maker = soft_prompt if kind == "embeddings" else kv_prompt
    return maker(tiny, m, seed, name, placement)


def same(one: Expert, other: Expert) -> bool:
    """Everything that an expert is made of."""
    fields = ("name", "placement", "kind", "culture", "base", "record", "content_hash")
    return all(getattr(one, field) == getattr(other, field) for field in fields) and torch.equal(
        one.embeddings, other.embeddings
    )


def scores(tiny: Tiny, expert: Expert, context: list[int]) -> torch.Tensor:
    """The engine's whole next-token distribution after a context."""
    engine = Engine(tiny.folder, page_size=8, kv_cache_tokens=1024)
    engine.add_expert(expert)
    return engine.score((context[:-3], context[-3:]), [[t] for t in range(tiny.vocab)], experts=[expert.name]).logprobs[
        0
    ]


@torch.no_grad()
def peft_scores(model: Any, context: list[int]) -> torch.Tensor:
    return model.eval()(torch.tensor([context])).logits[0, -1].float().log_softmax(-1)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- folders ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_saved_and_loaded(llama: Tiny, tmp_path: Path, kind: str, placement: str) -> None:
    plain = make_expert(llama, kind, placement)
    full = replace(plain, culture="日本", base="f" * 32, record={"text": "米", "epochs": 3})
    for expert in (plain, full):
        expert.save(tmp_path / "folder")  # the second replaces the first
        assert same(Expert.load(tmp_path / "folder"), expert)
        assert same(Expert.load(str(tmp_path / "folder")), expert)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert set(files(tmp_path / "folder")) == {"adapter_config.json", "adapter_model.safetensors", "expert.json"}
    assert not same(Expert.load(tmp_path / "folder"), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_kept_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of whatever float dtype, on no graph, untouched by later changes to what they were made from."""
    given = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    expert = Expert("e", given.t().contiguous().t())
    assert expert.embeddings.dtype == torch.float32
    assert not expert.embeddings.requires_grad
    assert torch.equal(expert.embeddings, given.detach().float())
    expert.save(tmp_path / "e")
    assert torch.equal(Expert.load(tmp_path / "e").embeddings, given.detach().float())
    save_file({"prompt_embeddings": given.detach().contiguous()}, tmp_path / "e" / "adapter_model.safetensors")
    assert torch.equal(Expert.load(tmp_path / "e").embeddings, given.detach().float())


def test_content_hash_names_the_function(llama: Tiny) -> None:
    expert = make_expert(llama, "embeddings", "prefix")
    alike = (replace(expert, name="other"), replace(expert, culture="x", base="y", record={"z": 1}), replace(expert))
    assert {one.content_hash for one in alike} == {expert.content_hash}
    nudged = expert.embeddings.clone()
    nudged[2, 7] = torch.nextafter(nudged[2, 7], torch.tensor(torch.inf))  # one bit
    flat = Expert("e", expert.embeddings.reshape(10, 32))
    kv = Expert("e", torch.zeros(1, 2, 2, 3, 4), "prefix", "kv")
    other = [replace(expert, embeddings=nudged), flat, kv, replace(kv, embeddings=torch.zeros(1, 2, 3, 2, 4))]
    assert len({expert.content_hash, *(one.content_hash for one in other)}) == 5


class Halfway(KeyboardInterrupt):
    """An interruption in the middle."""


@pytest.mark.parametrize("way", ["save", "to_peft"])
def test_interrupted_save_keeps_the_old_one(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    old, new = (make_expert(llama, "embeddings", "prefix", seed=seed) for seed in (1, 2))
    getattr(old, way)(tmp_path / "folder")
    before = files(tmp_path)

    def interrupted(tensors: dict[str, Any], path: Path, **_: Any) -> None:
        path.write_bytes(b"half of it")
        raise Halfway

    monkeypatch.setattr(experts_module, "save_file", interrupted)
    for target in ("folder", "fresh"):
        with pytest.raises(Halfway):
            getattr(new, way)(tmp_path / target)
        assert files(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("writer", ["save", "to_peft", "router", "checkpoint", "json"])
def test_what_the_system_refuses_to_write(llama: Tiny, tmp_path: Path, writer: str) -> None:
    """A limit of a file's size stands for a full disk: safetensors tells of both alike. The error names the place that was meant."""
    expert = make_expert(llama, "embeddings", "prefix", m=1000)
    router = random_router([expert], 64_000)
    write, name = {
        "save": (expert.save, "adapter_model.safetensors"),
        "to_peft": (expert.to_peft, "adapter_model.safetensors"),
        "router": (router.save, "router.safetensors"),
        "checkpoint": (
            lambda folder: checkpoint.save(folder, checkpoint.State({}, tensors={"value": expert.embeddings})),
            "state.safetensors",
        ),
        "json": (lambda folder: write_json(folder / "a.json", "x" * 200_000), "a.json"),
    }[writer]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            write(tmp_path / "folder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.filename, caught.value.strerror) == (str(tmp_path / "folder" / name), "File too large")
    assert files(tmp_path) == {} and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("moment", ["behind the first rename", "before the second"])
def test_interrupted_swap_keeps_the_old_one(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The last moments to be interrupted: the old folder is out of the way, the new one not yet in its place."""
    old, new = (make_expert(llama, "embeddings", "prefix", seed=seed) for seed in (1, 2))
    old.save(tmp_path / "folder")
    before, rename = files(tmp_path), Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise Halfway
        moved = rename(self, target)
        if target.name == "old" and moment == "behind the first rename":
            raise Halfway  # a signal is handled when the call of the system has returned
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(Halfway):
        new.save(tmp_path / "folder")
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("way", ["save", "to_peft"])
def test_what_is_no_expert_is_not_replaced(llama: Tiny, tmp_path: Path, way: str) -> None:
    expert = make_expert(llama, "embeddings", "prefix")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("all of it")
    (tmp_path / "notes.txt").write_text("some")
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    for target in ("thesis", "notes.txt"):
        with pytest.raises(WhispersError, match="exists, and holds no"):
            getattr(expert, way)(tmp_path / target)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    getattr(expert, way)(tmp_path / "empty")
    assert torch.equal(Expert.from_peft(tmp_path / "empty", "expert").embeddings, expert.embeddings)


@pytest.mark.parametrize("name", ["committee.json", "Committee.JSON", "router.safetensors", "README.md"])
def test_an_expert_takes_no_other_files_name(llama: Tiny, tmp_path: Path, name: str) -> None:
    first = make_expert(llama, "embeddings", "prefix", name="first")
    Committee.add(tmp_path, first, "base", "print")
    (tmp_path / "README.md").write_text("whose they are")
    with pytest.raises(WhispersError, match=re.escape(name)):
        Committee.add(tmp_path, make_expert(llama, "embeddings", "prefix", name=name), "base", "print")
    assert [expert.name for expert in Committee.load(tmp_path).experts] == ["first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "committee.json", "first"]


def test_an_expert_keeps_its_values(llama: Tiny) -> None:
    """Whatever becomes of the tensor that it was made of, such as an optimizer's step in place."""
    values = torch.ones(3, llama.hidden)
    expert = Expert("e", values)
    values.mul_(-1)
    assert bool((expert.embeddings == 1).all()) and expert.content_hash == Expert("e", -values).content_hash


# --- PEFT ------------------------------------------------------------------------------------------------------------------------


def train(model: Any, tiny: Tiny) -> None:
    """Three steps that move every value of the soft prompt away from where it began."""
    ids = torch.tensor([token_ids(tiny, 24, seed=11)])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all((parameter - old).abs().max() > 0.01 for parameter, old in zip(parameters, before, strict=True))


def prefix_config(tiny: Tiny, **settings: Any) -> PrefixTuningConfig:
    """PEFT guesses the shape of keys and values as hidden / heads; models with a head_dim of their own must be told."""
    config = tiny.hf.config
    heads, dim = (
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    if dim * config.num_attention_heads != config.hidden_size:
        settings |= {"num_attention_heads": heads, "token_dim": heads * dim, "num_layers": config.num_hidden_layers}
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, **settings)


def peft_config(tiny: Tiny, method: str) -> Any:
    if method == "prompt tuning":
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    return prefix_config(
        tiny, **({"prefix_projection": True, "encoder_hidden_size": 32} if "projected" in method else {})
    )


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning", "projected prefix tuning"])
def test_what_peft_trained_and_saved(tiny: Tiny, tmp_path: Path, method: str) -> None:
    """Four families: no grouping (qwen2), grouped (llama, 4 heads on 2), all heads on one (mistral, qwen3)."""
    torch.manual_seed(5)
    model = get_peft_model(copy.deepcopy(tiny.hf), peft_config(tiny, method))
    train(model, tiny)
    model.save_pretrained(tmp_path)
    expert = Expert.from_peft(tmp_path, "trained", culture="Japan")
    assert (expert.name, expert.placement, expert.culture) == ("trained", "prefix", "Japan")
    assert expert.kind == ("embeddings" if method == "prompt tuning" else "kv")
    assert expert.num_tokens == 6
    context = token_ids(tiny, 30, seed=12)
    want = peft_scores(model, context)
    torch.testing.assert_close(scores(tiny, expert, context), want, atol=TOLERANCE, rtol=0)
    # the oracle of the equivalence tests, which puts the values into a PEFT model of its own, agrees
    oracle = oracle_logprobs(copy.deepcopy(tiny.hf), expert, context[:-3], context[-3:], [5])[0]
    torch.testing.assert_close(oracle, want, atol=1e-5, rtol=0)
    base = peft_scores(tiny.hf, context)
    assert (want - base).abs().max() > 100 * TOLERANCE  # the expert matters


@pytest.mark.parametrize("kind", ["embeddings", "kv"])
@pytest.mark.parametrize("way", ["save", "to_peft"])
def test_peft_loads_what_we_write(tiny: Tiny, tmp_path: Path, kind: str, way: str) -> None:
    expert = make_expert(tiny, kind, "prefix")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a prefix is PEFT's own function: nothing to warn about
        getattr(expert, way)(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "expert.json").exists() == (way == "save")
    model = PeftModel.from_pretrained(copy.deepcopy(tiny.hf), tmp_path / "adapter")
    context = token_ids(tiny, 30, seed=12)
    torch.testing.assert_close(scores(tiny, expert, context), peft_scores(model, context), atol=TOLERANCE, rtol=0)
    model.save_pretrained(tmp_path / "back")
    assert Expert.from_peft(tmp_path / "back", "expert").content_hash == expert.content_hash


@pytest.mark.parametrize(("kind", "placement"), [case for case in CASES if case[1] != "prefix"])
def test_export_warns_where_peft_computes_another_function(
    llama: Tiny, tmp_path: Path, kind: str, placement: str
) -> None:
    expert = make_expert(llama, kind, placement)
    with pytest.warns(UserWarning, match=f"'expert' is {placement}; PEFT will compute it as prefix, another function"):
        expert.to_peft(tmp_path / "adapter")
    back = Expert.from_peft(tmp_path / "adapter", "expert", placement)
    assert same(back, expert)
    assert Expert.from_peft(tmp_path / "adapter", "expert").placement == "prefix"


# --- from text -------------------------------------------------------------------------------------------------------------------


def test_from_text_is_its_tokens_embeddings(llama: Tiny, engine: Engine) -> None:
    text = "rice, bread, tea"
    ids = llama.tokenizer.encode(text, add_special_tokens=False)
    table = llama.hf.get_input_embeddings().weight.detach()
    expert = Expert.from_text("table", text, engine, culture="Japan")
    assert torch.equal(expert.embeddings, table[ids])
    assert (expert.placement, expert.kind, expert.culture, expert.base) == (
        "suffix",
        "embeddings",
        "Japan",
        engine.fingerprint,
    )
    assert expert.record == {"text": text}
    assert Expert.from_text("table", text, engine, placement="detached").placement == "detached"


@pytest.mark.parametrize("m", [1, 2, 3, 5, 20])
def test_from_text_is_cut_or_repeated(llama: Tiny, engine: Engine, m: int) -> None:
    ids = llama.tokenizer.encode("rice, bread, tea", add_special_tokens=False)
    assert 3 < len(ids) < 20
    want = list(itertools.islice(itertools.cycle(ids), m))
    expert = Expert.from_text("table", "rice, bread, tea", engine, virtual_tokens=m)
    assert torch.equal(expert.embeddings, llama.hf.get_input_embeddings().weight.detach()[want])


def test_from_text_as_prefix_is_the_text_in_front(llama: Tiny, engine: Engine) -> None:
    """The soft prompt of a text, unlearned, says what the text itself says there."""
    text, context = "the people of many shores speak", token_ids(llama, 20, seed=4)
    expert = Expert.from_text("said", text, engine, placement="prefix")
    written = llama.tokenizer.encode(text, add_special_tokens=False) + context
    want = peft_scores(llama.hf, written)
    torch.testing.assert_close(scores(llama, expert, context), want, atol=TOLERANCE, rtol=0)


# --- committees ------------------------------------------------------------------------------------------------------------------


def test_committee_keeps_its_order(llama: Tiny, tmp_path: Path) -> None:
    folder, names = tmp_path / "deep" / "committee", ["west", "east", "north", "a.b-c_d", "1"]
    made = [make_expert(llama, *CASES[seed], seed=seed, name=name) for seed, name in enumerate(names)]
    for count, expert in enumerate(made, 1):
        Committee.add(folder, expert, "tiny", "f" * 32)
        found = Committee.load(folder)
        assert [one.name for one in found.experts] == names[:count]
    assert (found.base_name, found.fingerprint) == ("tiny", "f" * 32)
    assert all(same(one, other) for one, other in zip(found.experts, made, strict=True))
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "committee.json"])


def test_committee_replaces_an_expert_in_its_place(llama: Tiny, tmp_path: Path) -> None:
    for seed, name in enumerate(("west", "east", "north")):
        Committee.add(tmp_path, make_expert(llama, "embeddings", "suffix", seed=seed, name=name), "tiny", "f" * 32)
    untouched = files(tmp_path / "west") | {"committee.json": (tmp_path / "committee.json").read_bytes()}
    new = make_expert(llama, "kv", "detached", seed=9, name="east")
    Committee.add(tmp_path, new, "another name of the same base", "f" * 32)
    found = Committee.load(tmp_path)
    assert [one.name for one in found.experts] == ["west", "east", "north"]
    assert same(found.experts[1], new)
    assert found.base_name == "tiny"
    assert files(tmp_path / "west") | {"committee.json": (tmp_path / "committee.json").read_bytes()} == untouched


def test_committee_after_an_interrupted_add(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Committee.add(tmp_path, make_expert(llama, "embeddings", "suffix", name="west"), "tiny", "f" * 32)
    before = files(tmp_path)

    def interrupted(*_: Any, **__: Any) -> None:
        raise Halfway

    monkeypatch.setattr(experts_module, "save_file", interrupted)
    for name in ("west", "east"):
        with pytest.raises(Halfway):
            Committee.add(tmp_path, make_expert(llama, "embeddings", "suffix", seed=2, name=name), "tiny", "f" * 32)
        assert files(tmp_path) == before


def test_committee_in_an_engine(llama: Tiny, tmp_path: Path) -> None:
    """The same as its experts, added one by one."""
    context, header = token_ids(llama, 20, seed=1), token_ids(llama, 3, seed=2)
    one_by_one = Engine(llama.folder, page_size=8, kv_cache_tokens=1024)
    for seed, (kind, placement) in enumerate(CASES):
        expert = make_expert(llama, kind, placement, seed=seed, name=f"{kind}-{placement}")
        Committee.add(tmp_path / "committee", expert, str(llama.folder), one_by_one.fingerprint)
        one_by_one.add_expert(tmp_path / "committee" / expert.name)
    together = Engine(llama.folder, tmp_path / "committee", page_size=8, kv_cache_tokens=1024)
    assert together.experts == one_by_one.experts == [f"{kind}-{placement}" for kind, placement in CASES]
    assert together.cache_stats() == one_by_one.cache_stats()
    assert together.cache_stats()["pages_pinned"] == 4
    got, want = (engine.score((context, header), [[5], [6, 7]]) for engine in (together, one_by_one))
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=TOLERANCE, rtol=0)
    saved = json.loads((tmp_path / "committee" / "committee.json").read_text())
    assert saved == {
        "version": 1,
        "base": {"name": str(llama.folder), "fingerprint": together.fingerprint},
        "experts": together.experts,
    }


# --- in an engine ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "pages"), [(1, 1), (8, 1), (9, 2), (30, 4)])
@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_pinned_pages_come_and_go(llama: Tiny, engine: Engine, kind: str, placement: str, m: int, pages: int) -> None:
    """A soft prompt in front is pinned, one behind the context is not; a removed expert leaves nothing behind."""
    idle = engine.cache_stats()
    assert {key: idle[key] for key in IDLE} == IDLE
    pinned = 0 if placement == "suffix" else pages
    engine.add_expert(make_expert(llama, kind, placement, m, name="one"))
    engine.add_expert(make_expert(llama, kind, placement, m, seed=2, name="two"))
    assert engine.experts == ["one", "two"]
    assert engine.cache_stats() == {**idle, "pages_pinned": 2 * pinned, "pages_free": idle["pages_total"] - 2 * pinned}
    engine.remove_expert("one")
    assert engine.experts == ["two"]
    assert engine.cache_stats()["pages_pinned"] == pinned
    engine.remove_expert("two")
    assert engine.cache_stats() == idle
    engine.add_expert(make_expert(llama, kind, placement, m, name="one"))  # the name is free again
    assert engine.cache_stats()["pages_pinned"] == pinned


def test_failed_adding_leaves_nothing(llama: Tiny, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption in the middle of computing the soft prompt's keys and values."""
    idle = engine.cache_stats()

    def interrupted(*_: Any) -> None:
        raise Halfway

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", interrupted)
        with pytest.raises(Halfway):
            engine.add_expert(make_expert(llama, "embeddings", "prefix"))
    assert engine.experts == []
    assert engine.cache_stats() == idle
    engine.add_expert(make_expert(llama, "embeddings", "prefix"))


def test_every_event_has_a_public_name() -> None:
    """Whoever tells apart what `step` and `stream` hand out imports the kinds from the package."""
    kinds = [kind.__name__ for kind in get_args(Event)]
    assert len(kinds) == 7 and [name for name in kinds if name not in whispers_engine.__all__] == []


def essence(answer: Answer) -> list[Any]:
    """All of an answer but its log-probabilities, usage and timing."""
    records = [(record.expert, record.text, record.tokens, record.finish_reason) for record in answer.experts]
    return [answer.text, answer.routing, answer.votes, records]


def last(events: Any) -> Answer:
    answers = [event.answer for event in events if isinstance(event, Done)]
    assert len(answers) == 1
    return answers[0]


@pytest.mark.parametrize("moment", ["before the first event", "after the first token", "after a branch has finished"])
@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_removed_while_it_answers(llama: Tiny, engine: Engine, kind: str, placement: str, moment: str) -> None:
    """A request that was accepted goes on with the expert it asked, whatever is added in its place."""
    question, sampling = token_ids(llama, 20, seed=3), SamplingParams(max_tokens=4)
    for seed, name in enumerate(("stays", "leaves")):
        engine.add_expert(make_expert(llama, kind, placement, 12, seed=seed, name=name))
    want = engine.ask(question, experts=["leaves", "stays"], sampling=sampling)

    stream = engine.stream(question, experts=["leaves", "stays"], sampling=sampling)
    before = []
    if moment != "before the first event":
        until = Token if moment == "after the first token" else Finished
        before = [next(event for event in stream if isinstance(event, until))]
        assert isinstance(before[0], until)
    engine.remove_expert("leaves")
    assert engine.experts == ["stays"]
    engine.add_expert(make_expert(llama, kind, placement, 12, seed=7, name="leaves"))  # takes pages that came free
    got = last(stream)

    assert essence(got) == essence(want)
    assert [a.logprob for a in got.experts] == pytest.approx([a.logprob for a in want.experts], abs=TOLERANCE)
    stats = engine.cache_stats()
    assert stats["pages_pinned"] == (0 if placement == "suffix" else 4)
    assert (stats["pages_context"], stats["pages_branch"]) == (0, 0)
    other = engine.ask(question, experts=["leaves", "stays"], sampling=sampling)
    assert other.experts[1].tokens == want.experts[1].tokens
    assert other.experts[0].logprob != pytest.approx(want.experts[0].logprob, abs=TOLERANCE)


@pytest.mark.parametrize("placement", ["prefix", "suffix", "detached"])
def test_removed_while_its_request_is_queued(llama: Tiny, engine: Engine, placement: str) -> None:
    question, sampling = token_ids(llama, 20, seed=3), SamplingParams(max_tokens=3)
    engine.add_expert(make_expert(llama, "embeddings", placement, 12))
    want = engine.ask(question, sampling=sampling)
    number = engine.submit(Request(question, sampling=sampling))
    engine.remove_expert("expert")
    events: list[Any] = []
    while engine.busy:
        events += engine.step()
    assert essence(last(event for event in events if event.request_id == number)) == essence(want)
    stats = engine.cache_stats()
    assert {key: stats[key] for key in IDLE} == IDLE


def test_same_values_another_name(llama: Tiny, engine: Engine) -> None:
    """A prefix expert's context pages are found by what it computes, not by what it is called."""
    question = token_ids(llama, 20, seed=3)
    expert = make_expert(llama, "embeddings", "prefix")
    engine.add_expert(expert)
    assert engine.score(question, [[5]]).usage["context_tokens_cached"] == 0
    engine.remove_expert("expert")
    engine.add_expert(replace(expert, name="renamed"))
    assert engine.score(question, [[5]]).usage["context_tokens_cached"] == 16
    engine.remove_expert("renamed")
    engine.add_expert(make_expert(llama, "embeddings", "prefix", seed=2, name="expert"))
    assert engine.score(question, [[5]]).usage["context_tokens_cached"] == 0


def test_written_adapter_is_what_peft_documents(llama: Tiny, tmp_path: Path) -> None:
    """One tensor, `[m, hidden]`, or for prefix tuning keys and values alternating per layer."""
    soft, kv = make_expert(llama, "embeddings", "prefix"), make_expert(llama, "kv", "prefix")
    for expert in (soft, kv):
        expert.to_peft(tmp_path / expert.kind)
    tensors = {kind: load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("embeddings", "kv")}
    assert all(list(found) == ["prompt_embeddings"] for found in tensors.values())
    assert torch.equal(tensors["embeddings"]["prompt_embeddings"], soft.embeddings)
    flat = tensors["kv"]["prompt_embeddings"]
    assert flat.shape == (5, 3 * 2 * 2 * 16)
    for layer, which in itertools.product(range(3), (0, 1)):
        block = flat.view(5, 6, 2, 16)[:, 2 * layer + which]  # [m, kv_heads, head_dim]
        assert torch.equal(block.transpose(0, 1), kv.embeddings[layer, which])
    config = json.loads((tmp_path / "kv" / "adapter_config.json").read_text())
    assert (config["num_layers"], config["num_attention_heads"], config["token_dim"]) == (3, 2, 32)
