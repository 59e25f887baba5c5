# Everything runs in a virtual environment of its own, made on first need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# How many processes run tests; the tests of a module are one process's (conftest.py), and long ones are not begun
# last. With none but pytest's own, on a machine that is slow, nothing is late.
WORKERS ?= 0
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder
SOURCES = code_sandboxes tests benchmarks examples conftest.py

# $(1) while there is a container engine (tests/engine.sh), with its exit status. Ctrl-C is for pytest alone: this
# waits for it, and then ends the engine.
with_engine = @trap 'PYTHON=$(BIN)/python tests/engine.sh down' EXIT; trap 'exit 130' INT TERM; \
	PYTHON=$(BIN)/python tests/engine.sh up && $(1)

.PHONY: demo test test-fast isolation lint format bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/analysis.py

test: $(VENV)/test.stamp isolation
	$(call with_engine,$(PYTEST))

test-fast: $(VENV)/test.stamp isolation
	$(call with_engine,$(PYTEST) -m "not slow")

lint: $(VENV)/test.stamp
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; say which with: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "could not make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	@touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	$(BIN)/python -m bash_kernel.install --sys-prefix
	@touch $@

# Sandboxes of local-jupyter are isolated by bubblewrap. Where it is not and cannot be installed, the tests
# that take it are skipped and say so; CODE_SANDBOXES_REQUIRE_ISOLATION=1 makes them fail.
isolation:
	@command -v bwrap > /dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "installing bubblewrap, in which the tests isolate sandboxes"; \
		{ apt-get update -qq && apt-get install -qq --no-install-recommends bubblewrap > /dev/null; } || \
			echo "!! bubblewrap could not be installed: the tests of isolation will be skipped"; \
	else \
		echo "!! bubblewrap is not installed: the tests of isolation will be skipped"; \
	fi

clean:
	rm -rf $(VENV) .venv-peer .mypy_cache .pytest_cache .ruff_cache .hypothesis
