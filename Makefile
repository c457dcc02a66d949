# `make help` lists the targets. Everything is installed into .venv from the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test check bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: .venv/core  ## train a small language model on Python's own source, compare it with gzip and xz, and let it write
	$(BIN)/python scripts/demo.py

test: .venv/test  ## lint, check types, run the tests (also as on a processor with AVX2 only), and try the package as installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile
	scripts/check_package.sh $(BIN)/python

check: .venv/test  ## the quick part of `test`: lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench  ## speed against a plain loop, Hugging Face's Trainer and litgpt (takes a while; ROWS="--help" says more)
	$(BIN)/python scripts/bench/run.py $(ROWS)

clean:  ## remove .venv and caches; runs and prepared data stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .bench

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit("bigmodel needs Python 3.11 or later; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/core: .venv/python pyproject.toml constraints.txt
	@echo "installing into .venv (a few minutes the first time)"
	$(PIP) --editable .
	@touch $@

.venv/test: .venv/core
	$(PIP) --editable '.[test]' ./tests/outsider
	@touch $@

.venv/bench: .venv/core
	$(PIP) --editable '.[bench,examples]'
	@touch $@
