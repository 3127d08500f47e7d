# `make demo` sets everything up and runs the default simulation; `make test` sets everything up and runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all check clean

demo: $(VENV)/.installed
	$(BIN)/fl-sim run

test: $(VENV)/.installed-dev check
	$(BIN)/python -m pytest -n auto

test-all: $(VENV)/.installed-dev check
	$(BIN)/python -m pytest -n auto -m "not gpu or gpu"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
