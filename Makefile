# Everything from a bare checkout: each target makes .venv itself, and is quick when it exists.
PYTHON ?= python3
# Where pip takes packages from, and which torch: a CPU build, say, with
#   make test TORCH="torch==2.9.1+cpu torchvision==0.24.1+cpu" PIP_ARGS="--extra-index-url <PyTorch's CPU index>"
PIP_ARGS ?=
TORCH ?= torch torchvision
# As many processes as processors, but not so many that each waits for the others' memory; one that is done takes over
# tests of another.
PYTEST := python -m pytest -n auto --maxprocesses 8 --dist worksteal
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo ablate test test-slow test-gpu test-oldest test-newest bench lint types pyright docs docs-serve notebook wheel smoke \
	figures clean

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
	$(BIN)/python examples/demo.py

ablate: $(READY)  ## the paper's ablation on the embedded birds: a table and a plot (most of an hour, on 2 cores)
	$(BIN)/python examples/ablate.py --epochs 60

test: $(READY)  ## all tests but the slow ones and those for a GPU
	$(BIN)/$(PYTEST)

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/$(PYTEST) -m slow

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-oldest:  ## the tests on the oldest releases that setup.cfg allows, in .venv-oldest (Python 3.10 or 3.11)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python tests/oldest.py > .venv-oldest/pins.txt
	.venv-oldest/bin/python -m pip install --quiet $(PIP_ARGS) --constraint .venv-oldest/pins.txt $(TORCH) --editable '.[test]'
	.venv-oldest/bin/$(PYTEST)

test-newest:  ## the tests on the newest releases there are, in .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(PIP_ARGS) $(TORCH) --editable '.[test]'
	.venv-newest/bin/$(PYTEST)

bench: $(READY)  ## measure everything on this machine, then draw tables and plots (up to 10 minutes, nothing else running)
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/report.py

lint: $(READY)  ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy, strict, on the package
	$(BIN)/mypy

pyright: $(READY)  ## pyright, on the public names (it fetches itself on first use)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/typed .
	PYTHONPATH=build/typed PATH="$(CURDIR)/$(BIN):$$PATH" pyright --verifytypes apinet_head --ignoreexternal

docs: $(READY)  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-serve: $(READY)  ## the same while writing, on http://127.0.0.1:8000
	$(BIN)/mkdocs serve

notebook: $(READY)  ## run examples/walkthrough.ipynb anew, and keep its pictures
	cd examples && ../$(BIN)/jupyter execute --inplace walkthrough.ipynb

wheel: $(READY)  ## dist/*.whl and *.tar.gz, checked for the package index
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

smoke: wheel  ## both installed in empty environments, and the README's first lines run there
	for package in dist/*; do \
	    rm -rf .venv-smoke && $(PYTHON) -m venv .venv-smoke && \
	    .venv-smoke/bin/python -m pip install --quiet $(PIP_ARGS) $(TORCH) "$$package" && \
	    (cd /tmp && $(CURDIR)/.venv-smoke/bin/python -I $(CURDIR)/tests/smoke.py) || exit 1; \
	done

figures: $(READY)  ## draw the pictures of the documents anew
	PYTHONPATH=examples $(BIN)/python docs/figures/method.py
	$(BIN)/python docs/figures/ranks.py

clean:  ## remove what make and the tools made; runs/ stays
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
