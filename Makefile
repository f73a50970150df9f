# Developer commands. `make setup` and `make demo` are all a newcomer needs; the only network used is pip's.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
EXTRAS := dev,torchvision,timm,transformers,benchmarks,report,ray,train
BENCHMARKS := $(wildcard benchmarks/[a-z]*.py)

# Tests, demo and benchmarks that need real data look for it in INTRAFUSION_DATA.
DATA := $(realpath ../shared/data)
ifneq ($(DATA),)
export INTRAFUSION_DATA ?= $(DATA)
endif

.PHONY: setup demo test lint types bench-smoke

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into .venv; the first time this takes a few minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/intrafusion demo

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

bench-smoke: setup
	@set -e; for script in $(BENCHMARKS); do echo "$$script --smoke"; $(BIN)/python "$$script" --smoke; done
