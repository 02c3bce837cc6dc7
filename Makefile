# Everything a newcomer needs: `make quickstart`, `make test`, `make bench`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint types check bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: .venv/installed
	$(BIN)/surpass quickstart

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/pyright

check: .venv/installed
	$(BIN)/python -m pytest -n 2

test: lint types check

bench: .venv/installed
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv runs
