PYTHON ?= python3
# What pip installs for PyTorch: with a GPU the default build, without one the CPU build is smaller by gigabytes
TORCH ?= torch==2.13.0
# More arguments for pytest and the scripts, as in `make test ARGS="-k buffers"`
ARGS ?=

VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PACKAGES = sb3_iris benchmarks tests
LINT_PATHS = $(PACKAGES) setup.py

# The networks in the tests are so small that more threads, in processes started by tests too, would only wait for each other
test test-slow: export OMP_NUM_THREADS = 1
# Where another program keeps a core busy, threads that wait for each other by spinning take several times as long
demo: export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL = help
.PHONY: help venv demo test test-slow type lint format check-codestyle commit-checks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv and install everything in it

# PyTorch first, so that the build chosen above is the one the rest is resolved against
$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sb3_iris needs Python 3.10 or newer, see PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[extra,benchmarks,tests]"
	touch $@

demo: venv ## run the demo
	$(BIN)/python benchmarks/demo.py $(ARGS)

# Files stay together, as their tests share what they have trained
test: venv ## fast tests, as many files at once as there are cores, up to 8
	$(BIN)/python -m pytest tests --numprocesses auto --maxprocesses 8 --dist loadfile --durations=15 $(ARGS)

test-slow: venv ## slow tests only
	$(BIN)/python -m pytest tests -m slow --durations=15 $(ARGS)

type: venv ## check types
	$(BIN)/python -m mypy $(PACKAGES)

lint: venv ## check code and order of imports
	$(BIN)/python -m ruff check $(LINT_PATHS)
	$(BIN)/python -m ruff check --select I $(LINT_PATHS)

format: venv ## sort imports and format code
	$(BIN)/python -m ruff check --select I --fix $(LINT_PATHS)
	$(BIN)/python -m black $(LINT_PATHS)

check-codestyle: venv ## check what `format` would change
	$(BIN)/python -m ruff check --select I $(LINT_PATHS)
	$(BIN)/python -m black --check $(LINT_PATHS)

commit-checks: check-codestyle type lint ## all checks but the tests; changes no file

clean: ## remove what builds and tools left behind, but not .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(wildcard $(PACKAGES)) -name __pycache__ -type d -prune -exec rm -rf {} +
