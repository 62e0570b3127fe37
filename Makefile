# Everything a newcomer types. `make` alone lists the targets.
#
#   PYTHON=python3.12   another interpreter to make .venv from (3.11 or newer)
#   VENV=DIR            another place for the environment
#   CONSTRAINTS=        install the newest versions that pyproject.toml admits, or keep those the machine has
#   VENV_FLAGS=--system-site-packages   see the machine's own packages (a GPU machine with its torch: docs/install.md)
#   ARGS=...            passed on to what the target runs

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help up down test lint format typecheck bench install install-dev clean distclean

VENV ?= .venv
VENV_FLAGS ?=
CONSTRAINTS ?= constraints.txt
PYTHON ?=
BIN := $(VENV)/bin
# Of the large packages a fraction is ever imported: only that is compiled, by importing it once.
COMPILE = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -W ignore -c "import flexpert.cli.up, flexpert.controller.controller, \
  flexpert.controller.gateway.app, flexpert.workers.process, transformers.modeling_utils, transformers.masking_utils"
PIP_INSTALL = $(BIN)/python -m pip install -q --no-input --no-compile --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

UP_FLAGS = $(if $(MODEL),--model "$(MODEL)") $(if $(PORT),--port "$(PORT)") $(if $(DEVICE),--device "$(DEVICE)")

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "make %-12s %s\n", $$1, $$2}'

up: $(VENV)/.installed ## start a cluster in the foreground: MODEL=<directory or hub id> PORT= DEVICE=cpu|cuda ARGS=; Ctrl-C ends it
	@exec $(BIN)/flexpert up $(UP_FLAGS) $(ARGS)

down: ## end the running cluster, drained
	@if [ -x $(BIN)/flexpert ]; then exec $(BIN)/flexpert down $(ARGS); fi; echo "nothing to end: $(VENV) has no flexpert"

test: $(VENV)/.installed-dev ## run all tests, suite by suite: SUITES="hbm workers" ARGS="-k name"
	@$(BIN)/python tests/run_suites.py $(SUITES) $(if $(ARGS),-- $(ARGS))

lint: $(VENV)/.installed-dev ## ruff, formatting, types, import contracts
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed-dev ## format and fix what can be fixed
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format

typecheck: $(VENV)/.installed-dev ## mypy alone
	@$(BIN)/mypy

bench: $(VENV)/.installed-dev ## flexpert against transformers on the same model: prints a table, writes JSON
	@$(BIN)/python benchmarks/serve.py $(ARGS)

install: $(VENV)/.installed ## make .venv and install flexpert into it
install-dev: $(VENV)/.installed-dev ## the same with the tools of `make test` and `make lint`

define MAKE_VENV
[ -x $(BIN)/python ] || { \
   python=; found=; for each in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
     if "$$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$each"; break; fi; \
     found="$$found $$each ($$("$$each" --version 2>/dev/null || echo not found))"; done; \
   if [ -z "$$python" ]; then \
     echo "make: flexpert needs Python 3.11 or newer; tried$$found." \
       "Install one, or name one that is there: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
   "$$python" -m venv $(VENV_FLAGS) $(VENV) || { rm -rf $(VENV); \
     echo "make: $$python cannot make $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; }
endef

# The stamps follow the files that say what is installed; the code itself is linked, so it needs no reinstall.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(MAKE_VENV)
	@echo "installing flexpert into $(VENV) (the first time takes some minutes)"
	@$(PIP_INSTALL) -e .
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS)
	@$(MAKE_VENV)
	@echo "installing flexpert, with the test and lint tools, into $(VENV) (the first time takes some minutes)"
	@$(PIP_INSTALL) -e ".[dev]"
	@$(COMPILE)
	@touch $(VENV)/.installed $@

clean: ## remove caches and build output
	@rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## the same, and the environment
	@rm -rf $(VENV)
