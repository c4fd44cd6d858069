# kshot's commands. `make run` and `make test` set up all that they need, and start again in seconds once that exists.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GENERATOR := $(VENV)/generator/bin/openapi-python-client

.PHONY: help run test check site reproduce bench clean

help:  ## list these commands
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing kshot and what it is tested with (once, some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $(READY)

$(GENERATOR):  # a test has it make a client; it excludes versions that constraints.txt asks for
	@$(PYTHON) -m venv $(VENV)/generator
	@$(VENV)/generator/bin/python -m pip install --quiet --disable-pip-version-check openapi-python-client==0.29.1

run: $(READY)  ## take images to a promoted model: the default recipe, end to end
	@$(BIN)/kshot run $(or $(RECIPE),glyphs-protonet) $(SET)

test: $(READY) $(GENERATOR) check  ## lint, types, import directions, documentation, and every test
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: $(READY) site  ## lint, types, import directions and documentation only
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

site: $(READY)  ## the documentation as a site, in build/site; a warning is an error
	@said=$$(NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml 2>&1) || { echo "$$said"; exit 1; }

reproduce: $(READY)  ## train the recipes at full length (days without a GPU; bench/reproduce.sh says which, and from where)
	@bash bench/reproduce.sh

# What `make bench` does not run: parts and tools, and what needs data or a GPU.
APART := $(addprefix bench/,gpu.py performance_page.py photo_heads.py photos_vs_peers.py record_figures.py results_table.py schema_hooks.py \
	serve_parity.py serving_load.py speed.py time_to_accuracy.py)

bench: $(READY)  ## side-by-side measurements, written to bench/results/
	@for script in $(filter-out $(APART),$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

clean:  ## remove what `make` installed
	rm -rf $(VENV)
