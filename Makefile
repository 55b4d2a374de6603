# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyPI's torch for Linux brings gigabytes of CUDA. Without an NVIDIA driver the CPU build is taken from this index; where
# that cannot be reached, or TORCH_INDEX is empty, torch comes from pip's own index.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
# torch alone: its index has other packages too, and asking it for each of them would be slow.
TORCH_FIRST := $(PIP) install --quiet --constraint constraints.txt --no-deps --retries 0 --timeout 15 \
    --index-url $(TORCH_INDEX) torch 2> $(VENV)/torch.log || echo "No torch from $(TORCH_INDEX): taking pip's own."
EXTRAS := detection,dev,docs,hub,lightning,onnx,peers,plots,ray,s3,s3-tests,sb3,stats,sweeps,transformers

.PHONY: demo test test-all test-extras coverage lint typecheck docs docs-serve build-package benchmark-gpu install extras \
    clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(TORCH_FIRST))
	$(INSTALL) --editable ".[dev]"
	touch $@

extras: $(VENV)/.extras

# torchvision and timm come alone: as extras they would exchange the CPU build of torch for another one. So does the
# launcher of Ray, which would ask for an older joblib and works with this one.
$(VENV)/.extras: $(VENV)/.installed
	$(INSTALL) --editable ".[$(EXTRAS)]"
	$(INSTALL) --no-deps torchvision timm hydra-ray-launcher
	touch $@

demo: install
	$(BIN)/keepdrop prune

test: install
	$(BIN)/python -m pytest -n 2 --skipped-to=build/skipped.txt

test-all: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m ""

# What `make test` skipped, with every extra; a test that still misses a package fails.
test-extras: extras
	$(BIN)/python -m pytest -n 2 --dist loadgroup --extras @build/skipped.txt

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

coverage: install
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered

# What wants a GPU, in under fifteen minutes: DATA=cifar10.npz CHECKPOINTS=folder BEFORE=folder of an earlier keepdrop.
benchmark-gpu: install
	$(BIN)/python benchmarks/gpu.py $(if $(DATA),--data $(DATA)) $(if $(CHECKPOINTS),--checkpoints $(CHECKPOINTS)) \
	    $(if $(BEFORE),--before $(BEFORE))

# Static analysis does not follow the folder mapping, so the built package is what gets checked and documented.
build-package: install
	rm -rf build/typecheck build/lib
	$(PIP) install --quiet --no-deps --target build/typecheck .

typecheck: build-package
	cd build/typecheck && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p keepdrop

$(VENV)/.docs: $(VENV)/.installed
	$(INSTALL) --editable ".[docs]"
	touch $@

docs: build-package $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

docs-serve: build-package $(VENV)/.docs
	$(BIN)/mkdocs serve

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
