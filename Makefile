# Set-up in one command: `make demo` or `make test` make .venv on first use.
#   PYTHON=python3.12   another interpreter (3.11 or newer)
#   TORCH_INDEX=URL     where to take torch from (a CPU or ROCm build)
#   WORKERS=4           processes that `make test` runs the test files in

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults check lint types format wheel clean

help:
	@echo "make demo         the whole job on the embedded model and images, on a CPU"
	@echo "make test         the tests (under 10 minutes on two cores)"
	@echo "make check        tests, lint and types: what a change must pass"
	@echo "make test-faults  the long fault, fuzz and scale runs"
	@echo "make format       let ruff format the code"

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: this Python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) && touch $@

# torch goes first: with it in place nothing else pulls another build of it.
$(VENV)/installed: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing the pinned dependencies"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing the development tools"
	@$(PIP) --editable '.[dev,quant,prodigy,remote,tensorboard,heif]'
	@touch $@

demo: $(VENV)/installed
	@$(BIN)/qwen-lora demo --output demo

test: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -m 'not slow' --numprocesses $(WORKERS) --dist loadfile

test-faults: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	@$(BIN)/mypy

format: $(VENV)/installed-dev
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

check: test lint types

wheel: $(VENV)/installed-dev
	@rm -rf build dist && $(BIN)/python -m build --wheel --outdir dist >/dev/null && ls dist

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
