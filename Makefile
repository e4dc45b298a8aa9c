# make help lists what there is. Every target makes its own .venv first, if that is missing or out of date.
#
#   PYTHON=python3.12     which Python to use, 3.11 or later
#   PIP_ARGS="..."        further arguments for pip, for example --index-url of a mirror or of another build of torch
#   VENV=.venv            where the environment goes

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ONCE ?=
PYTEST_ARGS ?=
SEED ?= 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-chaos check sanitize bench headlines clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## the environment, with everything for development

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard native/*.cpp native/*.h)
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) --version); Polyphase needs 3.11 or later: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV); the first time takes some minutes, most of them for torch"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@[ -t 1 ] && quiet= || quiet=--quiet; \
	  $(BIN)/python -m pip install --disable-pip-version-check $$quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## serve the demo model over four processes and talk to it; ONCE=1 exits after that
	@$(BIN)/polyphase demo $(if $(ONCE),--once)

test: $(STAMP) ## all tests; PYTEST_ARGS="tests/unit -x" for some
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-chaos: $(STAMP) ## hundreds of faults over thousands of requests, some minutes; SEED=7 for others. The last line is JSON
	@$(BIN)/python -m tests.chaos --seed $(SEED)

check: $(STAMP) ## ruff, types, direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/unit/test_imports.py

sanitize: $(STAMP) ## tests of the C++ extension, built with the address and undefined-behaviour sanitizers
	@PYTHON=$(BIN)/python native/sanitize.sh

bench: $(STAMP) ## every benchmark, its table on the terminal
	@for script in benchmarks/*.py; do \
	  case $$script in */harness.py|*/peer*.py|*/dynamo_formula.py) ;; *) echo "== $$script"; $(BIN)/python $$script || exit 1 ;; esac; \
	done

headlines: $(STAMP) ## docs/headlines.md: well-known claims, asked of the advisor
	@$(BIN)/python tools/headlines.py > docs/headlines.tmp && mv docs/headlines.tmp docs/headlines.md

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
