# Everything runs in .venv, which `scripts/setup.sh` creates; docs/install.md lists the variables it knows.
SHELL := /bin/bash
VENV := $(or $(TESSERA_VENV),.venv)
PYTHON := $(VENV)/bin/python
RANKS ?= 2
DEMO_ROWS ?= 400000

.DEFAULT_GOAL := help
.PHONY: help install setup demo test test-slow lint doctor bench claims docs wheel clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: ## create .venv, install the pinned stack, compile the kernels (again)
	@scripts/setup.sh --rebuild

setup: # as install, but skips what is already done
	@scripts/setup.sh

demo: setup data/synthetic/schema.yaml ## train DeepFM on synthetic data over RANKS=2 processes, write a report
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/torchrun --standalone --nproc-per-node $(RANKS) \
		scripts/train.py experiment=demo $(ARGS)

data/synthetic/schema.yaml: | setup
	$(PYTHON) scripts/prepare.py synthetic --rows $(DEMO_ROWS) --output data/synthetic

# Processes of the tests share what Python compiles, also where the environment has it write nothing beside the sources.
test test-slow: export PYTHONDONTWRITEBYTECODE =
test test-slow: export PYTHONPYCACHEPREFIX = $(CURDIR)/build/pycache

test: setup ## run the tests, three files at a time, of which some only wait (ARGS="-k name" selects some)
	@$(PYTHON) -m compileall -q ctr distributed embedding kernels scripts
	$(PYTHON) -m pytest -q -n 3 --dist loadfile $(ARGS)

test-slow: setup ## run the tests that take minutes
	$(PYTHON) -m pytest -q -m slow $(ARGS)

lint: setup ## check style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	TESSERA_VENV=$(VENV) scripts/typecheck.sh

doctor: ## check the installation: what is wrong, and its cure
	@if [ -x $(PYTHON) ]; then $(PYTHON) scripts/doctor.py; else echo "no $(VENV) yet: run make install" >&2; exit 1; fi

bench: setup ## measure reader, training step and tables
	$(PYTHON) scripts/bench/reader.py
	$(PYTHON) scripts/bench/train_step.py
	$(PYTHON) scripts/bench/tables.py

claims: setup ## show what the papers claim and write docs/claims.md; DATA=FOLDER holds ml-100k and ml-100k-random (an hour)
	$(PYTHON) -m tessera.scripts.bench.claims $(if $(DATA),--data $(DATA)) $(ARGS)

docs: setup ## build the documentation's site into build/site, which opens without a network
	@$(PYTHON) -c "import mkdocs" 2>/dev/null || { echo "make docs needs Python 3.11 or later in $(VENV)" >&2; exit 1; }
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

wheel: setup ## build a wheel and a source distribution into dist/
	TESSERA_VENV=$(VENV) scripts/wheel.sh

clean: ## remove what can be built again, except the environment, data and runs
	rm -rf build kernels/_C*.so kernels/_build.json *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.tessera-project
