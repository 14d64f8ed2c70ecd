# Two commands on a fresh machine: `make demo` and `make test`.
# They need python3 (3.11 or newer) and make; a C++ compiler makes the kernels.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
WORKERS ?= 2
SECONDS ?= 600

.PHONY: demo test fuzz lint format types clean

demo: $(VENV)/.lab
	$(BIN)/normkit compare --data digits --model small-resnet --norms bn,gn:8,bgn:auto \
	  --batch-sizes 2,8,32 --epochs 4 --seeds 1,2,3 --out runs/demo

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --doctest-modules src tests

# Each search of tests/fuzz for so many seconds, with what it has tried.
fuzz: $(VENV)/.test
	NORMKIT_FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -s tests/fuzz

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.test
	$(BIN)/pyright

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist runs

# torch first: the kernels are built against it, without an isolated second one.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch "setuptools>=77" wheel
	touch $@

$(VENV)/.lab: $(VENV)/.torch pyproject.toml setup.py normkit_build.py $(wildcard csrc/*)
	$(PIP) --no-build-isolation --editable ".[lab]"
	touch $@

$(VENV)/.test: $(VENV)/.lab
	$(PIP) --no-build-isolation --editable ".[lab,test]"
	touch $@
