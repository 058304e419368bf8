# Each target sets up what it needs: a virtual environment with torch, the built extension, the packages it uses.
#   VENV=.venv       where the environment is made, or one that is there already (its torch is kept)
#   PYTHON=python3   what makes it
#   TORCH=2.11.0     the torch that is installed in it
#   TORCH_SYSTEM=1   no environment and no network: PYTHON as it is, with the torch it has
VENV ?= .venv
PYTHON ?= python3
TORCH ?= 2.11.0
TORCH_SYSTEM ?= 0
export MAX_JOBS ?= $(shell nproc)
TEST_JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory

BIN := $(abspath $(VENV))/bin
ifeq ($(TORCH_SYSTEM),1)
PY := $(PYTHON)
ENVIRONMENT :=
extras = build
else
PY := $(BIN)/python
export PATH := $(BIN):$(PATH)
ENVIRONMENT := $(VENV)/.pyrx-torch-$(TORCH)
extras = $(VENV)/.pyrx-extra-$(1)
endif

say = @printf '\n== %s\n' $(1)
HAS_TORCH := import re, torch; v = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])); assert v >= (2, 11), v

.PHONY: help demo test bench bench-compare gpu lint build cpp clean gpu-here
.DEFAULT_GOAL := help

help:
	@echo 'make demo    train a real model through pyrx: table and loss curves       (5 minutes after the build)'
	@echo 'make test    build, lint, types, C++ tests with sanitizers, pytest        (half an hour from a clean clone)'
	@echo 'make bench   time every op against PyTorch and peers, tables and charts    (40 minutes)'
	@echo 'make bench-compare BASE=<commit> [K=<filter>]: what is slower than there  (20 minutes for every case)'
	@echo 'make gpu     on a machine with a CUDA GPU: build, gpu tests, benchmarks   (10 minutes, no network needed)'
	@echo 'make lint    ruff and mypy'
	@echo 'make build   only the environment and the extension'
	@echo 'make clean   remove what was built (not the environment)'
	@echo 'Variables: VENV=$(VENV) PYTHON=$(PYTHON) TORCH=$(TORCH) TORCH_SYSTEM=$(TORCH_SYSTEM) MAX_JOBS=$(MAX_JOBS)'

demo: $(call extras,demo)
	$(call say,'demo: training on the handwritten digits (under 5 minutes)')
	@$(PY) examples/digits.py

test: $(call extras,test) lint cpp
	$(call say,'pytest on the CPU (some minutes)')
	@PYRX_REQUIRE=cpu $(PY) -m pytest -q -m 'not gpu' -n $(TEST_JOBS) --dist worksteal

bench: $(call extras,bench)
	$(call say,'benchmarks (about 40 minutes on 2 cores): results in bench/results')
	@$(PY) bench/run.py
	@$(PY) bench/report.py

# BASE: the commit to compare with; K: only the cases whose name matches
bench-compare: $(call extras,bench) build
	@test -n '$(BASE)' || { echo 'make bench-compare BASE=<commit> [K=<filter>]'; exit 2; }
	$(call say,'this tree against $(BASE), case by case')
	@$(PY) bench/compare.py '$(BASE)' $(if $(K),-k '$(K)')

# an environment made before wins, then a system Python whose torch sees a GPU, then a new environment
gpu:
	@if [ '$(TORCH_SYSTEM)' != 1 ] && [ ! -e '$(ENVIRONMENT)' ] && \
	  $(PYTHON) -c '$(HAS_TORCH); import pytest; assert torch.cuda.is_available()' 2>/dev/null; \
	then echo "== using $$(command -v $(PYTHON)): its torch sees a GPU, so nothing is downloaded"; \
	  $(MAKE) gpu-here TORCH_SYSTEM=1; \
	else $(MAKE) gpu-here; fi

# the benchmarks run also when a test failed; the exit status tells of both
gpu-here: $(call extras,test) $(call extras,bench) build
	$(call say,'gpu tests (up to 4 minutes)')
	@failed=0; jobs=$$($(PY) -c 'import xdist' 2>/dev/null && echo '-n 8' || true); \
	timeout 240 $(PY) -m pytest -q -m gpu $$jobs || failed=$$?; \
	printf '\n== %s\n' 'GPU benchmarks (up to 5 minutes): results in bench/results'; \
	timeout 290 $(PY) bench/run.py --device cuda --out bench/results --minutes 4.4 || failed=$$?; \
	$(PY) bench/report.py || failed=$$?; \
	exit $$failed

lint: $(call extras,test)
	$(call say,'lint and types (seconds)')
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

cpp: $(call extras,test)
	$(call say,'C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer (2 minutes)')
	@cmake -S . -B build/cmake -G Ninja -DPYRX_SANITIZE=ON
	@cmake --build build/cmake --parallel $(MAX_JOBS)
	@ctest --test-dir build/cmake --output-on-failure --parallel $(MAX_JOBS)

# always asks ninja, which compiles only what changed
build: $(ENVIRONMENT)
	$(call say,'the extension (minutes when all of it is compiled, else seconds)')
	@$(PY) setup.py build_ext --inplace

$(VENV)/.pyrx-torch-%:
	$(call say,'environment in $(VENV)')
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  echo '$(PYTHON) could not make an environment: on Debian and Ubuntu, apt-get install python3-venv python3-dev'; exit 1; }
	@if [ '$(origin TORCH)' = file ] && $(PY) -c '$(HAS_TORCH)' 2>/dev/null; \
	then echo 'torch is there already'; \
	else echo 'downloading torch $* (about 3 GB with the CUDA libraries it needs, some minutes)'; \
	  $(PY) -m pip install torch==$*; fi
	@$(PY) -m pip install -q 'setuptools>=77,<82' wheel ninja numpy
	@touch $@

# after the build, so that its progress is seen and pip finds it done
$(VENV)/.pyrx-extra-%: pyproject.toml $(ENVIRONMENT) | build
	$(call say,'packages for $*')
	@$(PY) -m pip list --format=freeze | grep '^torch==' > $(VENV)/torch.txt  # which no package is to change
	@$(PY) -m pip install -q --no-build-isolation -c $(VENV)/torch.txt -e '.[$*]'
	@touch $@

clean:
	rm -rf build pyrx.egg-info pyrx/_C*.so pyrx/_build_info.json
