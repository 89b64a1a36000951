# Every target sets up what it needs; a user needs Python 3.11 or newer with venv, and make.
#   make test VENV=.venv-other PYTHON=python3.13    another interpreter, in an environment of its own
#   make test WORKERS=8 ARGS="-k adam"              more processes, some of the tests

VENV ?= .venv
WORKERS ?= 2
ARGS ?=

# `python3` where it will do, else the first one that does. Each is run to find out: a name on PATH may
# be a version manager's stub for a version that is not selected.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
  "$$p" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
    && { echo "$$p"; break; }; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The suite runs on the CPU unless the caller names another platform.
PYTEST = JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m pytest
DOCTEST = XLA_FLAGS=--xla_backend_optimization_level=0 $(PYTEST) -n $(WORKERS) -q --doctest-modules lowrank_optax

.DEFAULT_GOAL := help
.PHONY: help install test test-fast lint format demo bench docs package clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the package (editable) and the development tools

$(STAMP): pyproject.toml
	@python='$(PYTHON)'; \
	test -n "$$python" || { echo "make: no Python 3.11 or newer with venv; try PYTHON=path" >&2; exit 1; }; \
	echo "installing into $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv "$(VENV)"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	@touch $@

test: $(STAMP) ## run the doctests, then every test
	$(DOCTEST)
	$(PYTEST) -n $(WORKERS) $(ARGS)

test-fast: $(STAMP) ## the tests that are not marked slow, without the doctests
	$(PYTEST) -n $(WORKERS) -m "not slow" $(ARGS)

lint: $(STAMP) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(STAMP) ## pre-train a small model on this machine (options in ARGS)
	$(BIN)/python -m experiments pretrain $(ARGS)

bench: $(STAMP) ## measure time and memory of low-rank training on this machine (options in ARGS)
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.docs ## build the documentation site into docs/_build/html
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -b html -c docs -n -W --keep-going -q . docs/_build/html
	@echo "docs/_build/html/index.html"

$(VENV)/.docs: $(STAMP)
	@$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

package: $(STAMP) ## build sdist and wheel into dist/, check them, and install the wheel alone
	@$(BIN)/python -m pip install --quiet build twine
	rm -rf dist build/bare && $(BIN)/python -m build --outdir dist . >/dev/null
	$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python -m venv build/bare && build/bare/bin/python -m pip install --quiet dist/*.whl
	cd build && bare/bin/python -c "import lowrank_optax as lro; print('the wheel is', lro.__version__)"
	@rm -rf build/bare

clean: ## remove environments, caches and builds
	rm -rf .venv .venv-* build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
