# Two commands matter: `make serve` and `make test`. Both set everything up on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
ARGS   ?=
BIN    := $(VENV)/bin
# One mark per kind of install, so a second run costs nothing.
RUN_MARK := $(VENV)/.installed
DEV_MARK := $(VENV)/.installed-dev

.PHONY: help serve test lint tools bench clean

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(VENV) was not made: install Python 3.11 or" \
		"newer with its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }

SOURCES := pyproject.toml setup.py $(wildcard gateway/engine/kernels/*.cpp gateway/engine/kernels/*.h)

$(RUN_MARK): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(DEV_MARK): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(RUN_MARK)

serve: $(RUN_MARK)  ## Install if needed, then serve the bundled model on HOST:PORT
	$(BIN)/pressgate serve --host $(HOST) --port $(PORT) $(ARGS)

tools:  ## Get the servers that tests talk to: Redis, Prometheus, Chromium
	@sh deploy/test-tools.sh

lint: $(DEV_MARK)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(DEV_MARK) tools lint  ## Everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report= $(ARGS)
	@$(BIN)/coverage report --skip-covered --sort=cover

bench: $(RUN_MARK)  ## The standard benchmark of every level of the bundled model
	$(BIN)/pressgate bench --levels all $(ARGS)

clean:  ## Remove what the targets above made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage*
