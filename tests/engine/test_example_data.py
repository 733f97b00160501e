"""The example data keep their forms: facts that name no country, held-out questions that are held out, routers' questions apart."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from whispers_engine.records import ChoiceRecord, read_records
from whispers_engine.router_examples import ANY, read_examples

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "data"
CULTURES = {json.loads(path.read_text("utf-8"))["culture"] for path in EXAMPLES.glob("cultures/*/expert.json")}
FACTS = ("facts-train.jsonl", "facts-heldout.jsonl")
MEASURED = ("routing.jsonl", "routing-second.jsonl")  # what routers are measured with
# What would name a country or its people in a question.
NAMES = {
    "United States": "united states|usa|americans?",
    "China": "china|chinese",
    "India": "india|indians?|hindi",
    "Japan": "japan|japanese",
    "Turkey": "turkey|turkish|turks?",
    "Vietnam": "vietnam|vietnamese",
    "Russia": "russia|russians?",
    "Brazil": "brazil|brazilians?",
    "South Africa": "south africa|south africans?",
    "Germany": "germany|germans?",
    "France": "france|french",
    "Italy": "italy|italians?",
    "Spain": "spain|spanish|spaniards?",
    "Mexico": "mexico|mexicans?",
    "Egypt": "egypt|egyptians?",
    "Kenya": "kenya|kenyans?",
    "Nigeria": "nigeria|nigerians?",
    "Indonesia": "indonesia|indonesians?",
    "Philippines": "philippines?|filipin[oa]s?",
    "Thailand": "thailand|thai|thais",
}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


def normal(question: str) -> str:
    """Case, punctuation, accents and white space do not make a question another one."""
    plain = "".join(
        char for char in unicodedata.normalize("NFKD", question.casefold()) if not unicodedata.combining(char)
    )
    return " ".join(re.findall(r"\w+", plain))


@pytest.mark.parametrize("name", FACTS)
def test_facts_are_records_of_choices(name: str) -> None:
    records = read_records(DATA / name).records  # which checks that every answer is the index of an option
    assert all(isinstance(record, ChoiceRecord) for record in records)
    assert len({record.id for record in records}) == len(records)
    for record, row in zip(records, rows(name), strict=True):
        assert isinstance(record, ChoiceRecord) and set(record.answer) <= CULTURES, row
        assert 2 <= len(record.options) <= 12, row
        assert all(len(option.split()) <= 6 for option in record.options), row
        assert len(set(record.answer.values())) >= 2, row  # a question that all answer alike teaches no culture


def test_every_culture_answers_every_fact_once() -> None:
    counts: Counter[str] = Counter()
    for name in FACTS:
        seen = Counter((row["question"], culture) for row in rows(name) for culture in row["answer"])
        assert max(seen.values()) == 1
        if name == "facts-train.jsonl":
            counts.update(culture for _, culture in seen)
    assert set(NAMES) == set(counts) == CULTURES and min(counts.values()) >= 65, counts


def test_facts_name_no_country() -> None:
    pattern = re.compile(rf"\b({'|'.join(NAMES.values())})\b", re.IGNORECASE)
    for name in FACTS:
        for row in rows(name):
            assert not pattern.search(row["question"]), row


def test_held_out_facts_are_held_out() -> None:
    train, held_out = rows("facts-train.jsonl"), rows("facts-heldout.jsonl")
    assert not {normal(row["question"]) for row in train} & {normal(row["question"]) for row in held_out}
    facts = {row["fact"] for row in train}
    kinds = {held: {row["fact"] for row in held_out if row["held"] == held} for held in ("paraphrase", "new")}
    assert {row["held"] for row in held_out} == set(kinds)
    assert kinds["paraphrase"] <= facts and not kinds["new"] & facts
    assert len(kinds["paraphrase"]) >= 40 and len(kinds["new"]) >= 15
    # A paraphrase asks for the same: every culture's answer is the one that it was trained on.
    answers = [
        {
            (row["fact"], culture): row["options"][index]
            for row in part
            if row["fact"] in kinds["paraphrase"]
            for culture, index in row["answer"].items()
        }
        for part in (train, held_out)
    ]
    assert answers[1].items() <= answers[0].items()


def measured_questions() -> set[str]:
    return {normal(row["question"]) for name in MEASURED for row in rows(name)}


def test_the_second_set_for_routers() -> None:
    """Five questions a culture, none of the first set; two name the country or its people, three a place."""
    second = rows("routing-second.jsonl")
    assert Counter((row["culture"], row["names"]) for row in second) == {
        (culture, names): count for culture in CULTURES for names, count in (("country", 2), ("city", 3))
    }
    assert all(row["place"] in row["question"] for row in second if row["names"] == "city")
    for row in second:
        assert row["names"] == "city" or re.search(rf"\b({NAMES[row['culture']]})\b", row["question"], re.IGNORECASE), (
            row
        )
    assert len(measured_questions()) == len(rows("routing.jsonl")) + len(second)


def test_neutral_questions() -> None:
    neutral = rows("neutral.jsonl")
    counts = Counter(row["split"] for row in neutral)
    assert all(row["neutral"] is True for row in neutral)
    assert set(counts) == {"train", "heldout"} and counts["train"] >= 80 and counts["heldout"] >= 40
    questions = Counter(normal(row["question"]) for row in neutral)
    assert max(questions.values()) == 1
    assert not set(questions) & measured_questions()


def test_router_questions_are_not_those_it_is_measured_with() -> None:
    examples = read_examples(DATA / "router-train.jsonl")
    questions = Counter(normal(example.question) for example in examples)
    assert max(questions.values()) == 1
    assert not set(questions) & measured_questions()
    counts = Counter(example.culture for example in examples)
    assert counts.pop(ANY) >= 60
    assert set(counts) == CULTURES and min(counts.values()) >= 30, counts
    unnamed = re.compile(rf"\b({'|'.join(NAMES.values())})\b", re.IGNORECASE)
    assert not [e.question for e in examples if e.culture == ANY and unnamed.search(e.question)]


def test_places_of_the_router_are_not_those_that_stay_unseen() -> None:
    """`router-places.jsonl` is what its script writes, and adds no city of `routing.jsonl`."""
    path = EXAMPLES / "make_router_questions.py"
    spec = importlib.util.spec_from_file_location("make_router_questions", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    places = rows("router-places.jsonl")
    assert places == [*module.rows(), *module.long_rows()]
    by_hand = "\n".join(row["question"] for row in rows("router-train.jsonl"))
    cities = [row["place"] for row in rows("routing.jsonl") if row["names"] == "city"]
    unseen = [city for city in cities if not re.search(rf"\b{city}\b", by_hand)]
    assert len(unseen) == 31
    assert not [row for row in places if re.search(rf"\b({'|'.join(unseen)})\b", row["question"])]
    assert not measured_questions() & {normal(row["question"]) for row in places}
    # Nor are the sentences those that it is measured with, with another name in them.
    for frame in (*module.ABOUT, *module.OF):
        words = re.sub(r"[^a-z ]", "", frame.lower()).split()
        for row in rows("routing.jsonl"):
            other = [
                word for word in re.sub(r"[^A-Za-z ]", "", row["question"]).split() if word in words or word.islower()
            ]
            alike = difflib.SequenceMatcher(None, words, [word.lower() for word in other], autojunk=False).ratio()
            assert row["culture"] is None or alike < 0.75, (frame, row["question"])
    counts = Counter(row["culture"] for row in places)
    assert counts.pop(ANY) and counts.pop(None) and set(counts) == CULTURES and min(counts.values()) >= 100


def test_all_is_small() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 2_000_000
