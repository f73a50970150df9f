# Developer commands. `make setup` and `make demo` are all a newcomer needs; the only network used is pip's.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
LOWEST := .venv-lowest
EXTRAS := dev,docs,torchvision,timm,transformers,onnx,benchmarks,ray,train
SMOKES := $(patsubst %.py,%.smoke,$(wildcard benchmarks/[a-z]*.py))

# Tests, demo and benchmarks that need real data look for it in INTRAFUSION_DATA.
DATA := $(realpath ../shared/data)
ifneq ($(DATA),)
export INTRAFUSION_DATA ?= $(DATA)
endif

# Tests and benchmarks start many processes; each would compile the whole package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-lowest fuzz lint types bench-smoke $(SMOKES) site

setup: $(STAMP)

# What is installed is compiled when it is first imported: most of it never is, and it takes twice as long as the rest.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into .venv; the first time this takes a few minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/intrafusion demo

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# What needs no extra, on the lowest versions that pyproject.toml promises. PyTorch's is the same as in .venv: what computes
# with nothing else is left out.
ONLY_TORCH := surgery restore network observe budget heads large factorize test_wrong_arguments.py
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow" $(ONLY_TORCH:%=--ignore=tests/%) $(ARGS)

# Compiled at once: old packages warn while they are, which a test takes for an error.
$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e . pytest pytest-xdist
	touch $@

# Random networks, kills and damaged folders, N times as many as in the tests, with counts; published networks whole.
N ?= 20
FUZZERS := $(wildcard tests/test_fuzz.py tests/test_kills.py tests/io/test_mutations.py tests/io/test_pretrained.py)
fuzz: setup
	INTRAFUSION_FUZZ=$(N) $(BIN)/python -m pytest -n 0 -s -m "" $(FUZZERS) $(ARGS)
	INTRAFUSION_FUZZ=$(N) $(BIN)/python -m pytest -n auto --maxprocesses 4 -m exhaustive tests
	INTRAFUSION_FUZZ=$(N) $(BIN)/python -m pytest -n auto --maxprocesses 4 tests/test_wrong_arguments.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright
	$(BIN)/pyright --project pyright-strict.json

bench-smoke: $(SMOKES)

$(SMOKES): %.smoke: setup
	$(BIN)/python $*.py --smoke

# The pages of docs/, README and CHANGELOG as a site in .site/; a broken link or an unknown name fails.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
