# Two commands on a fresh machine: `make demo` shows the main job, `make test` proves it.
# Both make .venv themselves, from pyproject.toml and the tested versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-long torture torture-hostile check format benchmark clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)  ## Run the whole thing on bundled media and an embedded S3 server
	$(BIN)/featurex demo

test: $(INSTALLED)  ## Run the tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(INSTALLED)  ## Run the tests that take a minute or more each: killed nodes, pools under pressure, trainings
	$(BIN)/python -m pytest -m long

torture: $(INSTALLED)  ## Run the fault campaigns at full counts (hours); figures into tests/faults/README.md
	FEATUREX_TORTURE=1 FEATUREX_FIGURES=1 $(BIN)/python -m pytest -m "long or not long" tests/faults

torture-hostile: $(INSTALLED)  ## Run the campaigns with hostile media at full counts
	FEATUREX_TORTURE=1 $(BIN)/python -m pytest -m "long or not long" -s tests/hostile

check: $(INSTALLED)  ## Lint, types, layers: what CI checks
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

benchmark: $(INSTALLED)  ## Measure this machine on bundled media
	$(BIN)/python jobs/benchmark.py

clean:  ## Remove what make and the tools made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
