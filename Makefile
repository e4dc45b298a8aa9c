# make help lists what there is. Every target makes its own .venv first, if that is missing or out of date.
#
#   PYTHON=python3.12     which Python to use, 3.11 or later
#   PIP_ARGS="..."        further arguments for pip, for example for a mirror or for another build of torch
#   VENV=.venv            where the environment goes
#   ENGINES=...           where stock engines are installed for test-engines, ~/.cache/polyphase-engines if not said

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ONCE ?=
PYTEST_ARGS ?=
SEED ?= 1
ENGINES ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/polyphase-engines
ENGINES_LIMIT_S ?= 3600

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-chaos test-engines test-engines-vllm test-engines-sglang test-nixl test-cuda check sanitize bench headlines clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

test-engines: test-engines-vllm test-engines-sglang ## both of the next two

test-engines-vllm: $(STAMP) ## Polyphase before a real vLLM (CPU): 2.3 GB in ENGINES, resumable, then some minutes; PYTEST_ARGS="-k split" for some
	@$(PYTHON) tools/install_vllm.py $(ENGINES)/vllm $(PIP_ARGS) > /dev/null
	@test -f $(ENGINES)/tiny/config.json || $(BIN)/python tools/make_tiny_model.py $(ENGINES)/tiny
	@ENGINE_PYTHON=$(ENGINES)/vllm/bin/python ENGINE_MODEL=$(ENGINES)/tiny timeout $(ENGINES_LIMIT_S) \
	  $(BIN)/python -m pytest $(wildcard tests/engines/real_vllm*.py) tests/engines/real_openai.py $(PYTEST_ARGS)

test-engines-sglang: $(STAMP) ## the same before real SGLang servers (CPU, Python 3.11): 3.1 GB; PYTEST_ARGS="-k Halves" for some
	@$(PYTHON) tools/install_sglang.py $(ENGINES)/sglang $(PIP_ARGS) > /dev/null
	@test -f $(ENGINES)/tiny/config.json || $(BIN)/python tools/make_tiny_model.py $(ENGINES)/tiny
	@ENGINE_PYTHON=$(ENGINES)/sglang/bin/python ENGINE_MODEL=$(ENGINES)/tiny timeout $(ENGINES_LIMIT_S) \
	  $(BIN)/python -m pytest tests/engines/real_sglang.py $(PYTEST_ARGS)

test-nixl: $(STAMP) ## the transfer library over NIXL, which is fetched (90 MB) into build/nixl; no GPU needed
	@test -d build/nixl/nixl || $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --no-deps --target build/nixl nixl nixl-cu12
	@POLYPHASE_REQUIRE_NIXL=1 PYTHONPATH=build/nixl $(BIN)/python -m pytest tests/nixl $(PYTEST_ARGS)

test-cuda: $(STAMP) ## the transfer library between device memories; needs a GPU
	@POLYPHASE_REQUIRE_CUDA=1 $(BIN)/python -m pytest tests/cuda $(PYTEST_ARGS)

check: $(STAMP) ## ruff, types, direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/unit/test_imports.py

sanitize: $(STAMP) ## tests of the C++ extension, built with the address and undefined-behaviour sanitizers
	@PYTHON=$(BIN)/python native/sanitize.sh

bench: $(STAMP) ## every benchmark, its table on the terminal
	@for script in benchmarks/*.py; do \
	  case $$script in */harness.py|*/peer*.py|*/dynamo_formula.py|*_cuda.py) ;; *) echo "== $$script"; $(BIN)/python $$script || exit 1 ;; esac; \
	done

headlines: $(STAMP) ## docs/headlines.md: well-known claims, asked of the advisor
	@$(BIN)/python tools/headlines.py > docs/headlines.tmp && mv docs/headlines.tmp docs/headlines.md

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
