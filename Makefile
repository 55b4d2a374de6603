# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-all coverage lint typecheck docs docs-serve build-package install clean

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

coverage: install
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered

# Static analysis does not follow the folder mapping, so the built package is what gets checked and documented.
build-package: install
	rm -rf build/typecheck build/lib
	$(PIP) install --quiet --no-deps --target build/typecheck .

typecheck: build-package
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p keepdrop

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

docs: build-package $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

docs-serve: build-package $(VENV)/.docs
	$(BIN)/mkdocs serve

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
