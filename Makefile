# `make demo` sets up and runs the main job, `make test` sets up and passes the tests; both on a bare machine with
# Python 3.11 or newer, and in seconds the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint check slow clean

demo: $(VENV)/.engine
	$(BIN)/gguf-sd demo -o out/demo
	$(BIN)/gguf-sd demo -o out/demo --model turbo --pictures 20

test: lint check

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

# The proofs that take minutes each, and that `make test` leaves out.
slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m slow

$(VENV)/.engine: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.engine
	$(PIP) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
