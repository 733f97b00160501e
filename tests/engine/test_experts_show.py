"""`whispers experts show`: norms, the base's tokens nearest to virtual ones, how alike experts are. No other weights are read."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.engine.test_cli as cli
import whispers_engine.engine as engine_module
import whispers_engine.similarity as similarity
from tests.engine.conftest import Tiny, make_tiny, soft_prompt
from tests.engine.test_cli import Whispers, row, rows
from tests.engine.test_weights import copied
from whispers_engine import Committee, Engine, Expert
from whispers_engine.weights import Checkpoint

whispers, committee, mine = (
    cli.whispers,
    cli.committee,
    cli.mine,
)  # fixtures: north and south are embeddings, east is kv


# --- the numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_at_once", [1, 2, 7, 100])
def test_nearest_tokens(monkeypatch: pytest.MonkeyPatch, rows_at_once: int, dtype: torch.dtype) -> None:
    """The same in however many parts the table is read."""
    monkeypatch.setattr(similarity, "_ROWS", rows_at_once)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(30, 8, generator=generator).to(dtype)
    virtual = torch.randn(5, 8, generator=generator) * 100
    found = similarity.nearest_tokens(virtual, table)
    want = torch.cosine_similarity(virtual.double()[:, None], table.double()[None], dim=-1)  # [m, V]
    cosine, ids = want.topk(3)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.cosine.double(), cosine, atol=1e-6, rtol=0)
    assert found.base_norm == pytest.approx(float(table.double().norm(dim=-1).mean()), rel=1e-6)


def test_nearest_tokens_at_the_edges() -> None:
    """Rows of zeros are like nothing, a vocabulary can be smaller than k, and there may be no virtual token at all."""
    table = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    found = similarity.nearest_tokens(torch.tensor([[6.0, 8.0], [0.0, 0.0]]), table)
    assert found.ids[0].tolist() == [1, 0]
    torch.testing.assert_close(found.cosine, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    none = similarity.nearest_tokens(torch.empty(0, 2), table)
    assert (none.ids.shape, none.cosine.shape, none.base_norm) == ((0, 2), (0, 2), 2.5)


def test_expert_similarity() -> None:
    """Of means: neither the order of virtual tokens nor their number nor their size matters."""
    east = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    diagonal = torch.tensor([[0.0, 2.0], [2.0, 0.0], [1.0, 1.0]])
    experts = [Expert("a", east), Expert("b", diagonal), Expert("c", -east[:1])]
    half = 0.5**0.5
    want = torch.tensor([[1, half, -1], [half, 1, -half], [-1, -half, 1]])
    torch.testing.assert_close(similarity.expert_similarity(experts), want)


# --- the command -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoken(mine: Path, llama: Tiny) -> Path:
    """The committee with one expert more, made of a sentence's tokens."""
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=512)
    Committee.add(mine, Expert.from_text("west", "rice, bread, tea", engine, culture="Japan"), "", engine.fingerprint)
    return mine


def test_json_of_one(whispers: Whispers, spoken: Path, llama: Tiny) -> None:
    """A virtual token that is a token of the base is nearest to that one."""
    shown = whispers("experts", "show", "west", "--committee", spoken, "--json").json()
    ids = llama.tokenizer.encode("rice, bread, tea", add_special_tokens=False)
    table = llama.hf.get_input_embeddings().weight.detach()
    assert (shown["name"], shown["culture"], shown["placement"]) == ("west", "Japan", "suffix")
    assert [tokens[0]["id"] for tokens in shown["nearest"]] == ids
    assert "".join(tokens[0]["token"] for tokens in shown["nearest"]) == "rice, bread, tea"
    assert all(tokens[0]["cosine"] == pytest.approx(1) for tokens in shown["nearest"])
    assert all(len(tokens) == 3 and tokens[0]["cosine"] > tokens[1]["cosine"] for tokens in shown["nearest"])
    assert shown["token_norms"] == pytest.approx(table[ids].norm(dim=-1).tolist())
    assert shown["norms"]["mean"] == pytest.approx(float(table[ids].norm(dim=-1).mean()))
    assert shown["base_norm"] == pytest.approx(float(table.norm(dim=-1).mean()), rel=1e-5)


def test_json_of_all(whispers: Whispers, spoken: Path, llama: Tiny) -> None:
    """Key-value experts have norms alone."""
    found = whispers("experts", "show", "--committee", spoken, "--json").json()
    experts = {expert.name: expert for expert in Committee.load(spoken).experts}
    assert [expert["name"] for expert in found["experts"]] == ["north", "south", "east", "west"]
    assert found["base"]["fingerprint"] == Committee.load(spoken).fingerprint
    for shown in found["experts"]:
        values = experts[shown["name"]].embeddings
        assert shown["shape"] == list(values.shape)
        assert shown["norms"]["largest"] == pytest.approx(float(values.norm(dim=-1).max()))
        assert (shown["nearest"] is None) == (shown["token_norms"] is None) == (shown["kind"] == "kv")
    assert found["similarity"]["names"] == ["north", "south", "west"]
    means = torch.stack([experts[name].embeddings.mean(0) for name in ("north", "south", "west")])
    want = torch.cosine_similarity(means[:, None], means[None], dim=-1)
    torch.testing.assert_close(torch.tensor(found["similarity"]["matrix"]), want)


def test_some_by_name(whispers: Whispers, spoken: Path) -> None:
    found = whispers("experts", "show", "west", "north", "west", "--committee", spoken, "--json").json()
    assert [expert["name"] for expert in found["experts"]] == found["similarity"]["names"] == ["west", "north"]


def test_tables(whispers: Whispers, spoken: Path) -> None:
    shown = whispers("experts", "show", "--committee", spoken, "--json").json()
    ran = whispers("experts", "show", "--committee", spoken)
    assert (ran.status, ran.err.strip()) == (0, "")
    norms = [cells[1] for cells in rows(ran) if cells[0] == "norms"]
    assert [("the base's tokens" in text) for text in norms] == [True, True, False, True]
    west = shown["experts"][3]
    first = [f"{token['cosine']:.2f} {token['token']!r}" for token in west["nearest"][0]]
    assert ["1", f"{west['token_norms'][0]:.3f}", *first] in rows(ran)
    matrix = shown["similarity"]["matrix"]
    for index, name in enumerate(("north", "south", "west")):
        assert row(ran, f"{index + 1} {name}")[1:] == [f"{value:.2f}" for value in matrix[index]]


def test_one_has_no_matrix(whispers: Whispers, spoken: Path) -> None:
    assert "cosine of" not in whispers("experts", "show", "west", "--committee", spoken).out
    assert "cosine of" not in whispers("experts", "show", "west", "east", "--committee", spoken).out
    kv = whispers("experts", "show", "east", "--committee", spoken)
    assert (kv.status, "nearest" in kv.out) == (0, False)


def test_a_matrix_wider_than_the_terminal(
    whispers: Whispers, mine: Path, llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on below, with every number and name whole."""
    fingerprint = Committee.load(mine).fingerprint
    for index in range(12):
        Committee.add(mine, soft_prompt(llama, 2, index, f"the-people-of-shore-{index}", "suffix"), "", fingerprint)
    monkeypatch.setenv("COLUMNS", "80")
    ran = whispers("experts", "show", "--committee", mine)
    assert all(len(line) <= 80 for line in ran.lines)
    matrix = whispers("experts", "show", "--committee", mine, "--json").json()["similarity"]
    for index, name in enumerate(matrix["names"]):
        parts = [cells[1:] for cells in rows(ran) if cells[0] == f"{index + 1} {name}"]
        assert len(parts) > 1
        assert list(chain.from_iterable(parts)) == [f"{value:.2f}" for value in matrix["matrix"][index]]


def test_parts_of_characters(whispers: Whispers, mine: Path, llama: Tiny) -> None:
    """A token that is no text by itself is shown as the vocabulary has it, a special one by its name."""
    byte, special = llama.tokenizer.convert_tokens_to_ids("Ã"), llama.tokenizer.convert_tokens_to_ids("<|end|>")
    table = llama.hf.get_input_embeddings().weight.detach()
    Committee.add(mine, Expert("parts", table[[byte, special]]), "", Committee.load(mine).fingerprint)
    shown = whispers("experts", "show", "parts", "--committee", mine, "--json").json()
    assert [tokens[0]["token"] for tokens in shown["nearest"]] == ["Ã", "<|end|>"]


def test_no_other_weights_are_read(whispers: Whispers, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    tensor = Checkpoint.tensor

    def noted(self: Checkpoint, name: str, *shape: int) -> Any:
        asked.append(name)
        return tensor(self, name, *shape)

    monkeypatch.setattr(Checkpoint, "tensor", noted)
    monkeypatch.setattr(engine_module, "Model", None)
    assert whispers("experts", "show", "--committee", mine).status == 0
    assert asked == ["model.embed_tokens.weight"]


def test_a_base_that_has_its_head_alone(whispers: Whispers, llama: Tiny, tmp_path: Path) -> None:
    """Tied, the head is the embeddings, whatever the file calls them."""
    base, folder = copied(llama.folder, tmp_path / "alone", tie_word_embeddings=True), tmp_path / "committee"
    tensors = load_file(llama.folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    engine = Engine(base, dtype="float32", kv_cache_tokens=256)
    Committee.add(folder, soft_prompt(llama, 4, 1, "north", "suffix"), engine.model_name, engine.fingerprint)
    ran = whispers("experts", "show", "north", "--committee", folder, "--json")
    assert ran.status == 0 and json.loads(ran.out)["name"] == "north"


def test_another_base(whispers: Whispers, mine: Path, llama: Tiny, tmp_path: Path) -> None:
    """A copy serves as well; a base of other weights is refused."""
    moved = shutil.copytree(llama.folder, tmp_path / "moved")
    path = mine / "committee.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "base": {**meta["base"], "name": str(tmp_path / "gone")}}))
    line = ("experts", "show", "north", "--committee", mine)
    gone = whispers(*line)
    assert (gone.status, gone.out) == (1, "")
    assert f"model: '{tmp_path / 'gone'}' is no folder here" in gone.err
    assert whispers(*line, "--model", moved, "--json").json()["name"] == "north"
    (tmp_path / "other").mkdir()
    other = whispers(*line, "--model", make_tiny("llama", tmp_path / "other", seed=5).folder)
    assert (other.status, other.out) == (1, "")
    assert f"{mine}: made for the base" in other.err
