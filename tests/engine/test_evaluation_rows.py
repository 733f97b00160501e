"""Rows of an evaluation on a tiny random model: each is what the engine itself answers, or what its definition gives by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.conftest import TEMPLATE, Tiny, kv_prompt, soft_prompt
from tests.engine.test_router import random_router
from whispers_engine import Committee, Engine, Expert, WhispersError
from whispers_engine.evaluation.cast import BASE, Cast, deranged, expert_key, read_cast
from whispers_engine.evaluation.compute import Computer, ways_to_tell
from whispers_engine.evaluation.data import Dataset, make_dataset, read_asked
from whispers_engine.evaluation.metrics import similarity
from whispers_engine.evaluation.routing import Router
from whispers_engine.evaluation.rows import Row
from whispers_engine.evaluation.run import Evaluation, Settings
from whispers_engine.evaluation.store import Store
from whispers_engine.evaluation.table import Table
from whispers_engine.records import prompt, read_records
from whispers_engine.request import Request
from whispers_engine.router import TokenRouter

RECORDS: list[dict[str, Any]] = [
    {"question": "what do people eat?", "options": ["rice", "bread", "tea"],
     "dist": {"Japan": [0.5, 0.5, 0], "Chad": [0.2, 0.2, 0.6], "Peru": [0, 0, 1]}},
    {"question": "who speaks in the morning?", "options": ["people", "we"], "answer": {"Japan": 0, "Peru": 1, "Cuba": 1}},
    {"question": "is tea good in Peru?", "options": ["very", "a little"], "dist": {"Peru": [0.9, 0.1]}, "names": "country"},
    {"question": "what is tea?", "options": ["a leaf", "a drink"], "culture": "Japan", "answer": "a drink"},
    {"question": "what is tea?", "options": ["a leaf", "a drink"], "culture": "Cuba", "answer": "a leaf"},
    {"question": "what of rice?", "options": ["yes", "no"], "dist": {"Chad": [1, 0]}},
]  # fmt: skip
CULTURES = ("Japan", "Peru", "Cuba")


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def members(tiny: Tiny) -> list[Expert]:
    """Cultures' experts of all placements, and one that speaks for nobody."""
    some = [
        soft_prompt(tiny, 3, 1, "nippon", "suffix"),
        soft_prompt(tiny, 4, 2, "andes", "detached"),
        kv_prompt(tiny, 2, 3, "havana", "prefix"),
        soft_prompt(tiny, 3, 4, "nobody", "suffix"),
    ]
    return [dataclasses.replace(expert, culture=c) for expert, c in zip(some, (*CULTURES, None), strict=True)]


def save(folder: Path, tiny: Tiny, experts: list[Expert], **router: Any) -> Path:
    engine = Engine(tiny.folder, page_size=8, kv_cache_tokens=512)
    for expert in experts:
        Committee.add(folder, expert, str(tiny.folder), engine.fingerprint)
    if router:
        random_router(experts, tiny.hidden, **router).save(folder)
    return folder


@pytest.fixture(scope="module")
def committee(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a router whose gate keeps some questions for the base."""
    folder = tmp_path_factory.mktemp("evaluated") / "mixed"
    gate = torch.randn(llama.hidden + 1, generator=torch.Generator().manual_seed(11))
    save(folder, llama, members(llama), temperature=9.0, gate=gate)
    engine = Engine(llama.folder, folder)
    router = engine.router
    assert isinstance(router, TokenRouter)
    prompts = [prompt(record)[0] for record in read_records(write(folder / "some.jsonl", RECORDS)).records]
    stakes = sorted(router.stake(feature) for feature in engine.read(prompts, router.reader))
    widest = max(range(1, len(stakes)), key=lambda at: stakes[at] - stakes[at - 1])  # where rounding decides nothing
    dataclasses.replace(router, gate_shift=-(stakes[widest] + stakes[widest - 1]) / 2).save(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "dev.jsonl", RECORDS)


class Bench:
    """An evaluation that has been computed, and a fresh engine to hold it against."""

    def __init__(self, tiny: Tiny, cast: Cast, dataset: Dataset, tmp_path: Path, train: Dataset | None = None):
        engine = Engine(tiny.folder, page_size=8, kv_cache_tokens=8192)
        names = cast.engage(engine)
        self.store = Store(tmp_path / "computed.jsonl", engine.fingerprint, engine.chat.content_hash, "float32")
        self.computer = Computer(engine, names, self.store)
        self.evaluation = Evaluation(self.computer, cast, dataset, train, [], Settings(top_k=2))
        self.evaluation.check()
        done: list[int] = []
        with self.store:
            self.evaluation.compute(lambda what, units: done.append(units))
            self.report = self.evaluation.report()
        assert sum(done) == self.evaluation.units
        stats = engine.cache_stats()
        assert (stats["pages_context"], stats["pages_branch"]) == (0, 0)
        self.rows: dict[str, Row] = {row.key: row for row in self.evaluation._rows()}


@pytest.fixture
def bench(llama: Tiny, committee: Path, source: Path, tmp_path: Path) -> Bench:
    cast = read_cast([committee], None)
    return Bench(llama, cast, make_dataset(read_records(source), cast.cultures), tmp_path)


def probabilities(engine: Engine, question: Any, options: list[str], experts: list[str]) -> np.ndarray:
    return engine.score(question, options, experts).logprobs.double().softmax(-1).numpy()[0]


def test_items(source: Path) -> None:
    dataset = make_dataset(read_records(source), CULTURES)
    assert dataset.cultures == CULTURES and dataset.left_out == {"Chad": 2}
    # What nobody of them answered is gone; two lines about one question are one.
    assert [item.record.line for item in dataset.items] == [1, 2, 3, 4]
    assert sorted(dataset.items[3].targets) == ["Cuba", "Japan"] and dataset.items[2].names == "country"
    shares, answers = dataset.pairs("dist"), dataset.pairs("answer")
    assert shares.item.tolist() == [0, 0, 2] and shares.culture.tolist() == [0, 1, 1]
    assert shares.target.tolist() == [[0.5, 0.5, 0], [0, 0, 1], [0.9, 0.1, 0]] and shares.size.tolist() == [3, 3, 2]
    assert [CULTURES[at] for at in answers.culture] == ["Japan", "Peru", "Cuba", "Japan", "Cuba"]
    assert answers.target.argmax(-1).tolist() == [0, 1, 1, 1, 0]


def test_one_question_in_two_records_is_one_cluster(tmp_path: Path) -> None:
    records = [RECORDS[0], {**RECORDS[0], "options": ["tea", "rice"], "dist": {"Japan": [1, 0]}}, RECORDS[1]]
    dataset = make_dataset(read_records(write(tmp_path / "x.jsonl", records)), None)
    assert [item.cluster for item in dataset.items] == [0, 0, 1] and dataset.clusters == 2


def test_records_of_one_fact_are_one_cluster(tmp_path: Path) -> None:
    """Other words for the same thing are not another question to draw."""
    records = [{**record, "fact": "food"} for record in (RECORDS[0], RECORDS[2])] + [RECORDS[1]]
    dataset = make_dataset(read_records(write(tmp_path / "x.jsonl", records)), None)
    assert [item.cluster for item in dataset.items] == [0, 0, 1]


@pytest.mark.parametrize(
    "asked, want",
    [
        ([("Q", "z1"), ("Q", "z2")], [0, 0]),
        ([("Q", "z"), ("Q", None)], [0, 0]),
        ([("Q", None), ("Q", "z")], [0, 0]),
        ([("Q", "z"), ("R", "z"), ("R", "y")], [0, 0, 0]),
        ([("Q", "x"), ("R", "y"), ("S", "y"), ("T", None), ("S", "x")], [0, 0, 0, 1, 0]),
        ([("Q", "R"), ("R", None)], [0, 1]),  # a fact that reads like a question is none
    ],
)
def test_clusters_are_linked_by_text_and_fact(
    tmp_path: Path, asked: list[tuple[str, str | None]], want: list[int]
) -> None:
    records = [
        {"question": text, "fact": fact, "options": ["yes", f"no {at}"], "answer": {"Japan": 0}}
        for at, (text, fact) in enumerate(asked)
    ]
    dataset = make_dataset(read_records(write(tmp_path / "x.jsonl", records)), None)
    found = {item.record.line: item.cluster for item in dataset.items}
    assert [found[line] for line in sorted(found)] == want and dataset.clusters == max(want) + 1


def test_records_that_are_not_measured_link_too(tmp_path: Path) -> None:
    def record(text: str, fact: str, culture: str) -> dict[str, Any]:
        return {"question": text, "fact": fact, "options": ["yes", "no"], "answer": {culture: 0}}

    records = [record("Q", "x", "Japan"), record("R", "y", "Japan")]
    for links in (
        [record("S", "x", "Chad"), record("S", "y", "Peru")],  # one question in two lines
        [record("Q", "y", "Chad")],
    ):
        source = read_records(write(tmp_path / "x.jsonl", [*records, *links]))
        assert [item.cluster for item in make_dataset(source, ["Japan"]).items] == [0, 0]
    source = read_records(write(tmp_path / "x.jsonl", [*records, record("S", "x", "Chad")]))
    assert [item.cluster for item in make_dataset(source, ["Japan"]).items] == [0, 1]


def said(culture: str, option: int = 0, **more: Any) -> dict[str, Any]:
    """A line of one culture's answer to a question that several are asked."""
    return {"question": "what do people eat?", "options": ["rice", "bread"], "answer": {culture: option}, **more}


def test_an_answer_is_in_its_own_lines_part(llama: Tiny, tmp_path: Path) -> None:
    """Lines that are one question may be of several parts; parts of what is not measured are none."""
    records = [
        said("Japan", region="Asia"),
        said("Cuba", 1, region="Americas"),
        said("Chad", region="Africa"),
        said("Peru"),
    ]
    records.append({**said("Cuba", region="Americas"), "question": "what is tea?"})
    source = read_records(write(tmp_path / "x.jsonl", records))
    dataset = make_dataset(source, CULTURES, by="region")
    assert len(dataset.items) == 2 and dataset.parts == ["Asia", "Americas", "other"]
    assert dataset.items[0].parts == {"Japan": "Asia", "Cuba": "Americas", "Chad": "Africa", "Peru": "other"}
    bench = Bench(llama, read_cast([], None), dataset, tmp_path)
    rows = bench.report["metrics"]["accuracy"]["rows"]
    assert {name: one["n"] for name, one in rows[0]["parts"].items()} == {"Asia": 1, "Americas": 2, "other": 1}
    for row in rows:
        for part, culture in (("Asia", "Japan"), ("Americas", "Cuba"), ("other", "Peru")):
            assert row["parts"][part] == row["cultures"][culture]


def test_the_order_of_lines_decides_nothing(tmp_path: Path) -> None:
    """Also where a culture has answered twice: none of its lines is joined with another, which then is nobody else's answer."""
    lines = [said("Japan"), said("Japan", 1), said("Italy", 1), said("Peru")]
    for some, want in (
        (lines, [{"Italy": 1}, {"Japan": 0}, {"Japan": 1}, {"Peru": 0}]),
        (lines[1:], [{"Italy": 1, "Japan": 1, "Peru": 0}]),
    ):
        for order in itertools.permutations(some):
            items = make_dataset(read_records(write(tmp_path / "x.jsonl", list(order))), None).items
            found = [{name: int(shares.argmax()) for name, shares in item.targets.items()} for item in items]
            assert sorted((dict(sorted(one.items())) for one in found), key=str) == want
            assert {item.cluster for item in items} == {0}


@pytest.mark.parametrize(
    "cultures, want",
    [
        (["Peru"], ["country"]),
        (["Peru", "Peru"], ["country", "country"]),
        (["Peru", "Cuba"], [None]),
        (["Peru", "Cuba", "Peru"], [None, None, None]),
    ],
)
def test_what_several_have_answered_names_none_of_them(
    tmp_path: Path, cultures: list[str], want: list[str | None]
) -> None:
    nobody = {**said("Peru"), "answer": {}}
    records = [nobody, *(said(culture, names="country") for culture in cultures)]
    dataset = make_dataset(read_records(write(tmp_path / "x.jsonl", records)), None)
    assert [item.names for item in dataset.items] == want


def test_aliases(source: Path) -> None:
    dataset = make_dataset(read_records(source), ["Tchad"], {"Chad": "Tchad"})
    assert dataset.cultures == ("Tchad",) and "Tchad" in dataset.items[0].targets
    with pytest.raises(WhispersError, match=r"dev.jsonl:1: two of its cultures are called 'Peru'"):
        make_dataset(read_records(source), None, {"Chad": "Peru"})


@pytest.mark.parametrize(
    "cultures, want",
    [
        (["a"], {}),
        (["b", "a"], {"a": "b", "b": "a"}),
        (["a", "b", "c"], {"a": "b", "b": "c", "c": "a"}),
        (["d", "c", "b", "a"], {"a": "c", "b": "d", "c": "a", "d": "b"}),
    ],
)
def test_derangement(cultures: list[str], want: dict[str, str]) -> None:
    assert deranged(cultures) == want


def test_the_table(tmp_path: Path) -> None:
    train = [
        {"question": "a", "options": ["yes", "no"], "dist": {"Japan": [0.8, 0.2], "Peru": [0, 1]}},
        {"question": "b", "options": ["yes", "no", "maybe"], "dist": {"Japan": [0.4, 0.2, 0.4]}},
        {"question": "c", "options": ["rice", "yes"], "answer": {"Japan": 0, "Peru": 0}},
    ]
    table = Table(make_dataset(read_records(write(tmp_path / "train.jsonl", train)), None))
    # Japan: yes (0.8 + 0.4 + 0) / 3, no 0.2, maybe 0.4, rice 1
    assert table.shares(["yes", "no"], "Japan") == pytest.approx([0.4 / 0.6, 0.2 / 0.6])
    assert table.shares(["rice", "yes", "tea"], "Japan") == pytest.approx(np.array([1, 0.4, 1 / 3]) / (1.4 + 1 / 3))
    assert table.shares(["yes", "rice"], "Peru") == pytest.approx([0, 1])
    assert table.shares(["yes"], "Peru").tolist() == [1.0]  # all 0: even
    assert table.shares(["yes", "no"], "Cuba") == pytest.approx([0.5, 0.5])
    # as one: yes (0.8 + 0 + 0.4 + 0 + 0) / 5, no (0.2 + 1 + 0.2) / 3
    assert table.shares(["yes", "no"], None) == pytest.approx(np.array([0.24, 1.4 / 3]) / (0.24 + 1.4 / 3))


def test_rows_are_what_the_engine_scores(bench: Bench, llama: Tiny, committee: Path) -> None:
    engine = Engine(llama.folder, committee)
    of = {expert.culture: expert.name for expert in members(llama)}
    other = {"Cuba": "Japan", "Japan": "Peru", "Peru": "Cuba"}
    dataset = bench.evaluation._dataset
    for item in dataset.items:
        asked, options = prompt(item.record)
        for culture in (name for name in item.targets if name in CULTURES):
            told = {"role": "system", "content": f"Answer as someone from {culture}."}
            turns = [told, {"role": "user", "content": asked}]
            for key, want in (
                ("uniform", np.full(len(options), 1 / len(options))),
                ("base", probabilities(engine, asked, options, [])),
                ("instruction", probabilities(engine, f"Answer as someone from {culture}.\n\n{asked}", options, [])),
                ("instruction-system", probabilities(engine, turns, options, [])),
                ("mixed/expert", probabilities(engine, asked, options, [of[culture]])),
                ("mixed/other", probabilities(engine, asked, options, [of[other[culture]]])),
            ):
                outcome = bench.rows[key].answer(item, culture)
                assert outcome is not None and outcome.p == pytest.approx(want, abs=1e-5), (key, item.record.line)
    oracle = bench.rows["others"].answer
    first = oracle(dataset.items[0], "Japan")
    assert first is not None and first.p == pytest.approx([0.1, 0.1, 0.8])  # of Chad too, which has no expert
    assert oracle(dataset.items[2], "Peru") is None  # nobody else answered


def test_a_template_without_a_systems_turn(llama: Tiny) -> None:
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=512)
    assert ways_to_tell(engine) == ["instruction", "instruction-system"]
    refuse = "{% for m in messages if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endfor %}"
    engine.tokenizer.chat_template = refuse + TEMPLATE
    assert ways_to_tell(engine) == ["instruction"]


def test_routed_rows_are_what_the_engine_answers(bench: Bench, llama: Tiny, committee: Path) -> None:
    """Routing, gate, profile, pools, votes and their ties: as `Engine.ask` with the committee's own router."""
    engine = Engine(llama.folder, committee)
    gated = []
    for item in bench.evaluation._dataset.items:
        asked, options = prompt(item.record)
        for culture in (name for name in item.targets if name in CULTURES):
            for kind, profile in (("routed", None), ("told", {"country": culture})):
                for aggregate in ("mixture", "product", "vote", "delegate"):
                    answer = engine.ask(asked, options, top_k=2, aggregate=aggregate, profile=profile)
                    outcome = bench.rows[f"mixed/{kind}/{aggregate}"].answer(item, culture)
                    assert outcome is not None and answer.options is not None
                    want = [answer.votes.get(o, 0.0) for o in options] if aggregate == "vote" else answer.options
                    assert outcome.p == pytest.approx(want, abs=1e-5)
                    assert list(outcome.asked) == [record.expert for record in answer.experts]
                    if aggregate != "delegate" and not answer.gated:
                        assert outcome.entropy == pytest.approx(answer.diversity_entropy, abs=1e-5)
                    if aggregate == "vote":
                        chosen = outcome.chosen if outcome.chosen >= 0 else int(outcome.p.argmax())
                        assert options[chosen] == answer.text
                    gated.append(answer.gated)
    assert 0 < sum(gated) < len(gated)


def test_a_committee_without_a_router_is_asked_whole(llama: Tiny, source: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "plain", llama, members(llama))
    cast = read_cast([folder], None)
    bench = Bench(llama, cast, make_dataset(read_records(source), cast.cultures), tmp_path)
    engine = Engine(llama.folder, folder)
    item = bench.evaluation._dataset.items[0]
    for aggregate in ("mixture", "product"):
        answer = engine.ask(*prompt(item.record), aggregate=aggregate)
        outcome = bench.rows[f"plain/all/{aggregate}"].answer(item, "Japan")
        assert outcome is not None and outcome.p == pytest.approx(answer.options, abs=1e-5)
    assert "plain/all/vote" in bench.rows and "plain/all/delegate" not in bench.rows
    assert bench.report["routing"] == {} and len(bench.report["metrics"]["similarity"]["matrices"]) == 1


def test_scores_of_the_report(bench: Bench) -> None:
    """Means, cultures' means and differences, from the rows themselves."""
    dataset, section = bench.evaluation._dataset, bench.report["metrics"]["similarity"]
    rows = {row["row"]: row for row in section["rows"]}
    scores = {}
    for key, row in bench.rows.items():
        scores[key] = [
            (culture, float(similarity(outcome.p, item.targets[culture])))
            for item in dataset.items
            if item.form == "dist"
            for culture in CULTURES
            if culture in item.targets and (outcome := row.answer(item, culture)) is not None
        ]
        values = [value for _, value in scores[key]]
        assert rows[key]["pooled"]["mean"] == pytest.approx(np.mean(values), abs=1e-6), key
        each = {name: [value for culture, value in scores[key] if culture == name] for name in CULTURES}
        means = [np.mean(values) for values in each.values() if values]
        assert rows[key]["macro"]["mean"] == pytest.approx(np.mean(means), abs=1e-6)
        assert {name: one["n"] for name, one in rows[key]["cultures"].items()} == {
            name: len(values) for name, values in each.items()
        }
    guess, mine = (np.mean([value for _, value in scores[key]]) for key in ("uniform", "mixed/expert"))
    assert rows["mixed/expert"]["skill"]["mean"] == pytest.approx((mine - guess) / (1 - guess), abs=1e-5)
    gap = next(one for one in section["differences"] if {one["a"], one["b"]} == {"base", "mixed/expert"})
    base = np.mean([value for _, value in scores["base"]])
    assert gap["pooled"]["mean"] == pytest.approx((base - mine) * (1 if gap["a"] == "base" else -1), abs=1e-6)
    assert rows["others"]["pooled"]["n"] == 2 and rows["base"]["pooled"]["n"] == 3
    assert section["matrices"] == []  # a prefix expert's context is its own: not everyone is asked everything
    accuracy = {row["row"]: row for row in bench.report["metrics"]["accuracy"]["rows"]}
    assert accuracy["uniform"]["pooled"]["mean"] == 0.5 and accuracy["uniform"]["pooled"]["low"] == 0.5


def test_latency_is_measured_in_turn(
    llama: Tiny, committee: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everyone is asked a question that is not measured; then question by question, so that a machine that slows down does so for all.
    What was measured group by group, by an earlier version, is not taken for it."""
    calls: list[tuple[str, int]] = []
    original = Engine.ask

    def ask(self: Engine, question: str, options: list[str], experts: list[str]) -> Any:
        assert self.cache_stats()["pages_kept"] == 0  # nothing of it is cached
        original(self, question, options, experts)
        calls.append((question, len(experts)))
        return SimpleNamespace(timing={"total": float(len(calls))})

    monkeypatch.setattr(Engine, "ask", ask)
    cast = read_cast([committee], None)
    dataset = make_dataset(read_records(source), cast.cultures)
    bench = Bench(llama, cast, dataset, tmp_path)
    asked = [item.prompt for item in dataset.items]
    assert calls == [(question, count) for question in (asked[0], *asked) for count in (0, 1, 2)]
    medians = {one["who"]: (one["questions"], one["median_ms"]) for one in bench.report["latency"]}
    assert medians == {"base": (4, 8500), "mixed: 1 expert": (4, 9500), "mixed: 2 experts": (4, 10500)}
    again = tmp_path / "again"
    again.mkdir()
    with Store(again / "computed.jsonl", *bench.store._salt[1:]) as store:
        for jobs in bench.evaluation._timed_jobs.values():
            store.add_seconds(
                store.key("seconds", [(bench.computer.key(job), job.experts) for job in jobs]), [99.0] * 4
            )
    calls.clear()
    assert Bench(llama, cast, dataset, again).report["latency"] == bench.report["latency"] and len(calls) == 15


def test_only_those_asked_see_a_context_of_their_own(bench: Bench) -> None:
    """Of a committee with prefix experts: the cultures' own, their stand-ins, and whom the router chooses."""
    item = bench.evaluation._dataset.items[2]  # Peru's alone
    key = bench.store.key(item.prompt, item.options)
    experts = {expert.name: expert_key(expert) for expert in bench.evaluation._cast.teams[0].experts.values()}
    router = Router(bench.evaluation._cast.teams[0], bench.computer, 2)
    chosen = {name for told in (None, "Peru") for name, _ in router.ask(item.prompt, told) or ()}
    want = {"andes", "havana", *chosen}
    assert {name for name, expert in experts.items() if not bench.store.missing(key, [expert])} == want


def test_several_committees_and_a_blind_one(llama: Tiny, committee: Path, source: Path, tmp_path: Path) -> None:
    """Committees of the same names side by side; only cultures that both have are measured; what they have in common is computed once."""
    some = [dataclasses.replace(expert, placement="suffix") for expert in members(llama)[:2]]
    second = save(tmp_path / "mixed", llama, some)
    blind = save(tmp_path / "blind", llama, [soft_prompt(llama, 5, 9, "everyone", "suffix")])
    cast = read_cast([committee, second], blind)
    assert [team.label for team in cast.teams] == ["mixed", "mixed#2"] and cast.cultures == ["Japan", "Peru"]
    dataset = make_dataset(read_records(source), cast.cultures)
    bench = Bench(llama, cast, dataset, tmp_path)
    assert dataset.left_out == {"Chad": 2, "Cuba": 2}
    item = dataset.items[0]
    one, two = (bench.rows[f"{label}/expert"].answer(item, "Japan") for label in ("mixed", "mixed#2"))
    assert one is not None and two is not None and (one.p == two.p).all()  # the same expert
    engine = Engine(llama.folder, blind)
    outcome = bench.rows["blind"].answer(item, "Japan")
    assert outcome is not None
    assert outcome.p == pytest.approx(probabilities(engine, *prompt(item.record), ["everyone"]), abs=1e-5)  # type: ignore[call-arg]
    matrix = bench.report["metrics"]["similarity"]["matrices"][0]
    assert (matrix["committee"], matrix["experts"]) == ("mixed#2", ["Japan", "Peru"])
    rows = {row["row"]: row for row in bench.report["metrics"]["similarity"]["rows"]}
    own = [rows["mixed#2/expert"]["cultures"][name]["mean"] for name in ("Japan", "Peru")]
    other = [rows["mixed#2/other"]["cultures"][name]["mean"] for name in ("Japan", "Peru")]
    assert matrix["values"] == [[own[0], other[0]], [other[1], own[1]]]


def test_scores_of_many_requests(llama: Tiny, committee: Path) -> None:
    """As one by one, in their order; a refused one ends it, and nothing stays behind."""
    engine = Engine(llama.folder, committee, page_size=8, kv_cache_tokens=4096)
    plain = Engine(llama.folder, committee, page_size=8, kv_cache_tokens=4096)
    requests = [
        Request(f"{word} " * n, ["rice", "tea, bread"], ["nippon", "havana"])
        for n in (30, 1, 9)
        for word in ("we", "no")
    ]
    for request, found in zip(requests, engine.score_many(requests, ahead=4), strict=True):
        want = plain.score(request.question, request.options or [], request.experts)
        torch.testing.assert_close(found.logprobs, want.logprobs, atol=1e-5, rtol=1e-5)
        assert found.experts == want.experts
    stream = engine.score_many([*requests[:3], Request("", ["rice"])], ahead=2)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(WhispersError, match="empty"):
        list(stream)
    abandoned = engine.score_many(requests, ahead=4)
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    stats = engine.cache_stats()
    assert (stats["pages_context"], stats["pages_branch"]) == (0, 0) and not engine.busy


def test_questions_for_the_router(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    lines = [
        {"question": "a", "culture": "US", "names": "city"},
        {"question": "b", "culture": None, "names": "x"},
        {"question": "c"},
    ]
    write(path, lines)
    found = read_asked(path, {"US": "United States"}, neutral=False)
    assert [(one.question, one.culture, one.names) for one in found] == [
        ("a", "United States", "city"),
        ("b", None, None),
        ("c", None, None),
    ]
    write(path, [{"question": "a", "split": "train"}, {"question": "b", "split": "heldout", "neutral": True}])
    assert [one.question for one in read_asked(path, {}, neutral=True)] == ["b"]
    write(path, [{"question": "a", "split": "train"}])
    with pytest.raises(WhispersError, match="holds no question to ask"):
        read_asked(path, {}, neutral=True)
    write(path, lines)
    with pytest.raises(WhispersError, match=r"asked.jsonl:1: is no question of that kind"):
        read_asked(path, {}, neutral=True)
    for culture in ("", " "):
        write(path, [lines[2], {"question": "a", "culture": culture}])
        for neutral in (False, True):
            with pytest.raises(WhispersError, match=r"asked.jsonl:2: is no question of that kind"):
                read_asked(path, {}, neutral=neutral)
    assert BASE == "base"
