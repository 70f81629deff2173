PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test check

train: .venv/installed
	$(BIN)/python train.py fit --config configs/base.yaml

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[test]"
	touch $@
