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

# One thread for each of the two workers: more of them would only wait for each other.
check: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 15

test: lint types check

bench: .venv/installed
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv runs
