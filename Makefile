# `make demo` sets everything up and runs the default simulation; `make test` sets everything up and runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest Python that pyproject.toml allows, for `make test-lowest`.
OLDEST ?= python3.11

.PHONY: demo test test-all test-lowest bench bench-others check clean

demo: $(VENV)/.installed
	$(BIN)/fl-sim run

test: $(VENV)/.installed-dev check
	$(BIN)/python -m pytest -n auto

test-all: $(VENV)/.installed-dev check
	$(BIN)/python -m pytest -n auto -m "not gpu or gpu"
	$(MAKE) test-lowest

# The default tests with the oldest releases that pyproject.toml allows; those above have the newest. Old releases warn
# of deprecations in newer ones of what they need themselves: none of ours.
test-lowest:
	$(OLDEST) -m venv --clear $(VENV)-lowest
	$(OLDEST) tests/lowest.py > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(VENV)-lowest/constraints.txt -e ".[dev,joblib,mlflow,optuna,submitit,wandb]"
	$(VENV)-lowest/bin/python -m pytest -n auto -W ignore::DeprecationWarning

# The benchmarks one after another, each with its numbers as JSON in bench/; on an idle machine.
bench: $(VENV)/.installed-bench
	mkdir -p bench
	$(BIN)/python benchmarks/engines.py -o bench/engines.json
	$(BIN)/python benchmarks/batched.py --rounds 3 --repeats 1 -o bench/batched.json
	$(BIN)/python benchmarks/scaling.py -o bench/scaling.json
	$(BIN)/python benchmarks/erasing.py --settings digits --share 0.05 --repeats 3 -o bench/erasing.json
	$(BIN)/python benchmarks/aggregators.py -o bench/aggregators.json
	$(BIN)/python benchmarks/evaluation.py -o bench/evaluation.json

# The same work by other simulators.
bench-others: $(VENV)/.installed-bench
	mkdir -p bench
	$(BIN)/python benchmarks/others.py --workers 2 --repeats 2 -o bench/others.json

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

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
