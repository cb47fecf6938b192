# Everything from a bare checkout: each target makes .venv itself, and is quick when it exists.
PYTHON ?= python3
# Where pip takes packages from, and which torch: a CPU build, say, with
#   make test TORCH="torch==2.9.1+cpu torchvision==0.24.1+cpu" PIP_ARGS="--extra-index-url <PyTorch's CPU index>"
PIP_ARGS ?=
TORCH ?= torch torchvision
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo ablate test test-slow test-gpu bench lint types wheel figures clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "need Python 3.10 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) $(TORCH)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable '.[dev]'
	touch $@

demo: $(READY)  ## train baseline and API-Net on the embedded birds, and compare them (minutes, on a CPU)
	$(BIN)/python examples/cub/demo.py

ablate: $(READY)  ## the paper's ablation on the embedded birds: a table and a plot (most of an hour, on 2 cores)
	$(BIN)/python examples/cub/ablate.py --epochs 60

test: $(READY)  ## all tests but the slow ones and those for a GPU
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(READY)  ## measure everything on this machine, then draw tables and plots (up to 10 minutes, nothing else running)
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/report.py

lint: $(READY)  ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy, strict, on the package
	$(BIN)/mypy

wheel: $(READY)  ## dist/*.whl and *.tar.gz
	$(BIN)/python -m build

figures: $(READY)  ## draw the pictures of the documents anew
	$(BIN)/python docs/figures/method.py
	$(BIN)/python docs/figures/ranks.py

clean:  ## remove what make and the tools made; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
