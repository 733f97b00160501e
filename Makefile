# Each target does its own set-up: a virtual environment in .venv with pinned versions, and the base model.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := smollm2-135m-instruct
DATA := examples/data
# 20 experts, some 75 facts each, every one with options and in words: 120 steps of 4 are three times through all.
TRAINING := --placement detached --steps 120 --batch 4 --rate 0.003 --dev-share 0
ASK := $(BIN)/whispers ask --committee examples/cultures --experts japan,italy,mexico,india

.PHONY: demo test lint cultures kernels-page clean

demo: $(VENV)/.demo
	@$(ASK) "Which currency do people pay with here?" --option yen --option euro --option peso --option rupee
	@$(ASK) "How do people greet each other?" --max-tokens 16

test: $(VENV)/.dev
	@$(BIN)/whispers pull $(BASE)
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Makes the shipped committee anew; it takes the old one's place when all is done.
cultures: $(VENV)/.demo
	rm -rf build/cultures && mkdir -p build
	$(BIN)/python examples/facts_in_words.py > build/facts.jsonl
	$(BIN)/whispers train build/facts.jsonl --out build/cultures $(TRAINING) --licence Apache-2.0
	$(BIN)/whispers experts router $(DATA)/router-train.jsonl $(DATA)/router-places.jsonl $(DATA)/neutral.jsonl \
		--records $(DATA)/facts-train.jsonl --calibrate $(DATA)/routing.jsonl --committee build/cultures
	rm -rf examples/cultures && mv build/cultures examples/cultures

kernels-page: $(VENV)/.dev ## compiles every Triton variant and rewrites the tables of docs/kernels.md
	$(BIN)/python -m whispers_kernels.triton.aot --write docs/kernels.md

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch first, alone: pip then finds it installed and looks for no other build of it.
$(VENV)/.venv: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	@touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@$(BIN)/whispers pull $(BASE)
	@touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
