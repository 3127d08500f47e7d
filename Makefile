# `make demo` sets everything up and runs the default simulation; `make test` sets everything up and runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all bench check clean

demo: $(VENV)/.installed
	$(BIN)/fl-sim run

test: $(VENV)/.installed-dev check
	$(BIN)/python -m pytest -n auto

test-all: $(VENV)/.installed-dev check
	$(BIN)/python -m pytest -n auto -m "not gpu or gpu"

# The benchmarks one after another, each with its numbers as JSON in bench/; on an idle machine.
bench: $(VENV)/.installed
	mkdir -p bench
	$(BIN)/python benchmarks/engines.py --repeats 2 -o bench/engines.json
	$(BIN)/python benchmarks/batched.py digits --repeats 3 -o bench/batched.json
	$(BIN)/python benchmarks/scaling.py -o bench/scaling.json
	$(BIN)/python benchmarks/erasing.py --settings digits --share 0.1 -o bench/erasing.json
	$(BIN)/python benchmarks/aggregators.py -o bench/aggregators.json
	$(BIN)/python benchmarks/evaluation.py -o bench/evaluation.json

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
