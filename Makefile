# make quickstart   install, then train, certify and report on scikit-learn's digits
# make test         install with the development extras, then lint, types and tests

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check

.PHONY: quickstart test install develop

quickstart: install
	$(BIN)/tightrope quickstart

test: develop
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto

install: .venv/installed
develop: .venv/developed

# torch goes first and alone: where a CPU build is at hand, pip takes it; a range would pull CUDA.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) install torch==2.13.0
	$(PIP) install --editable .
	touch $@

.venv/developed: .venv/installed
	$(PIP) install --editable '.[dev]'
	touch $@
