# make demo      a story model from nothing through all three steps, on a CPU
# make test      lint, types and the fast tests
# make test-all  the slow tests too, about 25 minutes on two cores; where all pass, docs/reliability.md is written anew
# make lint      ruff and mypy alone
# make bench     trivium beside other tools (benchmarks/bench.py says how long); needs the network the first time
# make clean     caches and build results; the environment stays
#
# Needs Python >= 3.10 with venv and pip; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all lint bench clean

demo: .venv/installed-run
	$(BIN)/trivium demo

test: lint
	$(PYTEST)

# With a = , for pytest takes a file that is there, which an earlier run has left, for one of tests.
test-all: lint
	$(PYTEST) -m "slow or not slow" --reliability=.reliability.md
	mv .reliability.md docs/reliability.md

lint: .venv/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/installed-test
	$(BIN)/python benchmarks/bench.py $(BENCH)

# Each stamp is the last thing its rule makes, so an interrupted install is begun again; making an environment
# that is already there mends it. What the tests need holds what running needs.
.venv/installed-run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	touch $@

.venv/installed-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable ".[test]"
	touch .venv/installed-run $@

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -exec rm -rf {} +
