# Two commands for a fresh Linux machine that has Python 3.10 or newer with venv, and g++:
#   make demo    make .venv, install, show everything, write onepass-demo/report.html
#   make test    lint, types and all tests
# and
#   make lint    ruff, ruff format --check, mypy
#   make bench   every benchmark of the GPU, or of the CPU where there is none, results into benchmarks/ (hours on two cores)
#   make clean   remove what the above made
# Variables: PYTHON (which interpreter), VENV (where), TORCH (what pip installs when no torch >= 2.9 is there yet),
# THREADS, ARGS (more arguments for pytest or for onepass bench).
PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch==2.13.0
THREADS ?= 2
ARGS    ?=

BIN     := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt README.md $(shell find csrc src -type f -not -path '*/__pycache__/*' -not -path '*/_lib/*')

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:
	@sed -n '/^PYTHON/q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-cli
	$(BIN)/onepass demo --threads $(THREADS)

test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q tests $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-cli
	$(BIN)/onepass bench all --plot --threads $(THREADS) $(ARGS)
	$(BIN)/onepass bench bandwidth --plot --threads $(THREADS)

# One file per set of extras: `make test` after `make demo` adds the tools for tests, and either installs again when a source has changed.
$(VENV)/.installed-%: $(SOURCES) scripts/install.sh
	PYTHON='$(PYTHON)' VENV='$(VENV)' TORCH='$(TORCH)' sh scripts/install.sh $*
	@touch $@

clean:
	rm -rf .venv build dist onepass-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
