# `make demo` and `make test` need Python 3.11 or newer, make and git; all else they install into .venv.

PYTHON ?= python3
# cpu, or cuda on a machine with an NVIDIA GPU and its driver.
DEVICE ?= cpu
# Where to get torch alone from, for a machine whose usual index gives another build than DEVICE asks for.
TORCH_INDEX ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-for-$(DEVICE)
OTHER_DEVICES = $(filter-out $(INSTALLED),$(wildcard $(VENV)/installed-for-*))
LOCKS := requirements/lock.txt requirements/dev.txt requirements/torch-$(DEVICE).txt
PIP = $(BIN)/python -m pip -qq --disable-pip-version-check install --progress-bar off
# A CUDA torch brings packages that no lock of ours can name for every machine.
TORCH_DEPENDENCIES = $(if $(filter cuda,$(DEVICE)),--constraint requirements/lock.txt,--no-deps)

export DO_NOT_TRACK ?= true
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export PREFECT_RESULTS_DEFAULT_SERIALIZER ?= json

define timed
@start=$$(date +%s); $(2); echo "$(1): passed in $$(($$(date +%s) - start)) s"
endef

.DEFAULT_GOAL := help
.PHONY: help demo compare lab test test-slow faults distributed lint install clean check-python

help:  ## List the targets.
	@echo 'tidemark: make TARGET [PYTHON=python3.12] [DEVICE=cuda] [TORCH_INDEX=address]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(INSTALLED)  ## Learn 24 hours of synthetic clicks, hour by hour, and print what freshness is worth.
	@mkdir -p demo/prefect
	@unset PREFECT_API_URL; PREFECT_HOME='$(CURDIR)/demo/prefect' $(BIN)/python flows/demo.py

compare: $(INSTALLED)  ## Compare batch strategies on 24 synthetic hours, 5 seeds each, about 5 minutes on two cores.
	@mkdir -p compare/prefect
	@unset PREFECT_API_URL; PREFECT_HOME='$(CURDIR)/compare/prefect' $(BIN)/python flows/compare_batch_strategies.py \
	  --dataset synthetic --generate --landing compare/landing --state-dir compare/state --seeds 5 --workers 2

lab: $(INSTALLED)  ## Put claims about batch sizes to the test, renew docs/batch_size.md; under 8 minutes on two cores.
	@mkdir -p lab/prefect
	@unset PREFECT_API_URL; PREFECT_HOME='$(CURDIR)/lab/prefect' $(BIN)/python flows/batch_size_lab.py \
	  --state-dir lab/state --docs docs --workers 2

test: lint  ## Run the checks and the tests.
	@$(BIN)/python -m pytest -m 'not slow' --numprocesses 2 --dist loadfile --durations=5

test-slow: lint  ## Run the checks and all tests, the slow ones too.
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations=10

faults: $(INSTALLED)  ## Kill, corrupt, fill the disk and fuzz, as docs/faults.md tells; half an hour or more on two cores.
	@$(BIN)/python -m pytest tests/faults --numprocesses 2 --dist loadfile --durations=10

distributed: $(INSTALLED)  ## Train with 2, 4 and 16 processes, and kill some; several minutes on two cores.
	@$(BIN)/python -m pytest tests/distributed --durations=10

lint: $(INSTALLED)  ## Run ruff and mypy only.
	$(call timed,ruff check,$(BIN)/ruff check --quiet .)
	$(call timed,ruff format,$(BIN)/ruff format --quiet --check . || { echo 'run: $(BIN)/ruff format .' >&2; exit 1; })
	$(call timed,mypy --strict,$(BIN)/mypy --no-error-summary)

install: $(INSTALLED)  ## Make .venv, without running anything.

clean:  ## Remove .venv and the caches; state/, landing/, demo/, compare/ and lab/ stay.
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(wildcard data_schemas sampling models pipeline flows benchmarks tests) -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): $(LOCKS) requirements/direct.txt pyproject.toml | check-python
	@echo 'Installing into $(VENV) for $(DEVICE): usually 2 to 3 minutes, once.'
	@if [ -n '$(OTHER_DEVICES)' ]; then rm -rf $(VENV); fi
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(INSTALLED)
	@$(PIP) $(TORCH_DEPENDENCIES) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') $$(grep '^torch==' requirements/torch-$(DEVICE).txt)
	@$(PIP) --no-deps $(addprefix --requirement=,$(LOCKS))
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $(INSTALLED)

requirements/torch-$(DEVICE).txt:
	@echo "unknown DEVICE '$(DEVICE)'; use cpu or cuda" >&2; exit 2

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tidemark needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo 'Name another one: make demo PYTHON=python3.12' >&2; exit 2; }
