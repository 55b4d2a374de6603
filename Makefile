# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-all lint typecheck install clean

install: $(VENV)/.installed

# torch comes first and pinned: its CPU build, not gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/keepdrop prune

test: install
	$(BIN)/python -m pytest -n 2

test-all: install
	$(BIN)/python -m pytest -n 2 -m ""

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Static checkers do not follow the folder mapping, so the built package is what gets checked.
typecheck: install
	rm -rf build/typecheck
	$(PIP) install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p keepdrop

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
