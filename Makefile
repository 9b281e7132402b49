# `make help` lists the targets. VENV=none uses the Python on PATH (or PYTHON=) as it is.
VENV ?= .venv
WORKERS ?= 2
export PYTHON

ifeq ($(VENV),none)
PYTHON_HERE := $(shell command -v $(or $(PYTHON),python3))
LINT_IMPORTS := lint-imports
else
PYTHON_HERE := $(VENV)/bin/python
LINT_IMPORTS := $(VENV)/bin/lint-imports
USER_ENVIRONMENT := $(VENV)/.made-for-use
TEST_ENVIRONMENT := $(VENV)/.made-for-tests
endif
PY := $(PYTHON_HERE) -m

.PHONY: help demo test test-gpu fuzz lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: $(USER_ENVIRONMENT) ## install, train a model on real input, profile, serve and compare it
	$(PY) recflow_jax demo

test: $(TEST_ENVIRONMENT) ## every check that needs no GPU: lint, types, arrows, tests
	$(PY) ruff check .
	$(PY) ruff format --check .
	$(PY) pyright --pythonpath $(PYTHON_HERE)
	$(LINT_IMPORTS)
	$(PY) pytest -n $(WORKERS) -m "not gpu"

test-gpu: $(TEST_ENVIRONMENT) ## the tests of the GPU kernels; exit status 5 where no GPU can run them
	$(PY) pytest -m gpu

fuzz: $(TEST_ENVIRONMENT) ## a hundred thousand inputs for the decoders and for submit
	$(PY) tools.fuzz

lock: $(USER_ENVIRONMENT) ## resolve the dependencies anew into uv.lock
	$(PY) uv lock --upgrade --default-index https://pypi.org/simple

clean: ## remove the environment and everything that the tools cache
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist demo

$(VENV)/.made-for-use: uv.lock pyproject.toml tools/venv.sh
	tools/venv.sh $(VENV)
	@touch $@

$(VENV)/.made-for-tests: uv.lock pyproject.toml tools/venv.sh
	tools/venv.sh $(VENV) dev
	@touch $@ $(VENV)/.made-for-use
