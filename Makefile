# Each target does its own set-up: a virtual environment in .venv with pinned versions, and the base model.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := smollm2-135m-instruct
TWENTY := United States,China,India,Japan,Turkey,Vietnam,Russia,Brazil,South Africa,Germany,France,Italy,Spain,Mexico,Egypt,Kenya,Nigeria,Indonesia,Philippines,Thailand
TRAINING := --placement detached --steps 60 --batch 4 --rate 0.005 --dev-share 0
ASK := $(BIN)/whispers ask --committee examples/cultures --experts japan,italy,mexico,india

.PHONY: demo test lint cultures kernels-page clean

demo: $(VENV)/.demo
	@$(ASK) "Which sport do most people follow here?" --option Baseball --option Football --option Cricket
	@$(ASK) "What do people usually eat for breakfast?" --max-tokens 16

test: $(VENV)/.dev
	@$(BIN)/whispers pull $(BASE)
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Trained beside the shipped one, and put in its place whole. The same seed gives the same weights on the same machine.
cultures: $(VENV)/.demo ## trains the shipped committee anew, and its router
	rm -rf build/cultures
	$(BIN)/whispers train examples/data/facts-train.jsonl --out build/cultures --experts "$(TWENTY)" \
	    $(TRAINING) --licence Apache-2.0
	$(BIN)/whispers experts router examples/data/routing-train.jsonl --committee build/cultures
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
