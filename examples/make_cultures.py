"""Makes `examples/cultures`: one expert a country, its soft prompt the embeddings of one sentence, and the router. Takes some minutes.

python examples/make_cultures.py
"""

from __future__ import annotations

from pathlib import Path

from whispers_engine import Committee, Engine, Expert
from whispers_engine.records import read_records
from whispers_engine.router_examples import Example, read_examples, record_examples
from whispers_engine.router_fit import fit_router

COUNTRIES = {
    "united-states": "the United States",
    "china": "China",
    "india": "India",
    "japan": "Japan",
    "turkey": "Turkey",
    "vietnam": "Vietnam",
    "russia": "Russia",
    "brazil": "Brazil",
    "south-africa": "South Africa",
    "germany": "Germany",
    "france": "France",
    "italy": "Italy",
    "spain": "Spain",
    "mexico": "Mexico",
    "egypt": "Egypt",
    "kenya": "Kenya",
    "nigeria": "Nigeria",
    "indonesia": "Indonesia",
    "philippines": "the Philippines",
    "thailand": "Thailand",
}
SENTENCE = "You live in {country}. Answer briefly, as people in {country} would."
ROUTER = ("router-train.jsonl", "router-places.jsonl", "neutral.jsonl")


def router_examples() -> list[Example]:
    """What the router and its gate are trained with."""
    data = Path(__file__).parent / "data"
    named = [example for name in ROUTER for example in read_examples(data / name)]
    return named + record_examples(read_records(data / "facts-train.jsonl"))


def main() -> None:
    engine = Engine("smollm2-135m-instruct")
    folder = Path(__file__).parent / "cultures"
    for name, country in COUNTRIES.items():
        text = SENTENCE.format(country=country)
        expert = Expert.from_text(name, text, engine, "suffix", culture=country.removeprefix("the "))
        Committee.add(folder, expert, engine.model_name, engine.fingerprint)
        engine.add_expert(expert)
    examples = router_examples()
    fit_router(engine, examples).router.save(folder)
    print(f"{folder}: {len(COUNTRIES)} experts, and a router from {len(examples)} examples")


if __name__ == "__main__":
    main()
