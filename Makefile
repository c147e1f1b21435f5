# Everything a developer or a first-time user needs; `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.run
DEV_STAMP := $(VENV)/.dev
BENCH_STAMP := $(VENV)/.bench
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help up test bench fault check format lock clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-8s %s\n", $$1, $$2}'

up: $(RUN_STAMP) ## Install what is needed and start the whole system (ARGS="--port-offset 100")
	@SUTAZAI_HOME="$${SUTAZAI_HOME:-$(CURDIR)/.sutazai}" exec $(BIN)/sutazai up $(ARGS)

test: $(DEV_STAMP) ## Run the whole test suite on private servers, two files at a time (ARGS="-n 0 -k name")
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(BENCH_STAMP) ## Measure it beside other task systems, write benchmarks/results.md (ARGS="--only drain --quick")
	@$(BIN)/python -m benchmarks $(ARGS)

fault: $(DEV_STAMP) ## Inject every fault many times, write docs/faults.md (ARGS="--runs 5 --seconds 10 --jobs 2 --only broker")
	$(BIN)/python -m tests.faults $(ARGS)

check: $(DEV_STAMP) ## Check format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --quiet tests/unit/test_architecture.py

format: $(DEV_STAMP) ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(DEV_STAMP) ## Renew the hash-locked requirements
	$(BIN)/python deploy/lock.py

clean: ## Remove the virtual environment and all caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The package itself is installed last and without dependencies: those are locked by hash.
$(RUN_STAMP): deploy/requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --require-hashes -r deploy/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q sutazai
	touch $@

$(DEV_STAMP): deploy/requirements-dev.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --require-hashes -r deploy/requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@ $(RUN_STAMP)

# What is only compared with is not locked.
$(BENCH_STAMP): $(DEV_STAMP)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[bench]'
	touch $@
