# Every target sets up what it needs, on a machine with only python3, pip, make and a C compiler.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# The first constrains what is installed, the second (newer pip) what the package is built with.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check slow bench engines vectors clean

## demo: pack a real fine-tune against its real base, verify, unpack, compare byte for byte
demo: $(VENV)/installed
	$(BIN)/python tools/demo.py

## test: lint, types, layers, then every test but the slow ones
test: check
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## slow: the tests that take more than a few seconds
slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

## bench: the numbers in the README, in one run each; sizes are by tools/sizes.py, the edge's by tests/test_edge.py
bench: $(VENV)/installed-bench
	$(BIN)/python tools/bench_lossless.py
	$(BIN)/python tools/bench_lowrank.py
	$(BIN)/python tools/bench_merged.py
	$(BIN)/python tools/bench_serving.py
	$(BIN)/python tools/bench_memory.py
	$(BIN)/python tools/bench_open.py

## engines: the plugins against vLLM's and SGLang's own source, some 400 MB from the package index; nothing else needs it
engines: $(VENV)/installed-dev
	$(BIN)/python tools/check_engines.py

## vectors: write the conformance vectors in spec/vectors anew
vectors: $(VENV)/installed-dev
	$(BIN)/python tools/make_vectors.py

clean:
	rm -rf $(VENV) .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist

# Stamps: an environment is made anew when what it was installed from has changed since.

KERNELS := hatch_build.py $(wildcard deltafmt/native/*.[ch])

$(VENV)/installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the development pins need Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev,torch,hub]'
	touch $@

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(PIP) --editable '.[dev,torch,hub,bench]'
	touch $@
