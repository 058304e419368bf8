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

FUZZ_CASES ?= 12000
FUZZ_SEED ?= 0
GPU_TEST_SECONDS ?= 540
GPU_BENCH_MINUTES ?= 9
SANITIZE_SECONDS ?= 240
GPU_BUILT ?= gpu-build-here

.PHONY: help demo test test-large fuzz fuzz-sanitize test-threads test-cuda-host bench bench-compare docs gpu-model dist lint \
  build cpp clean $(foreach each,gpu gpu-build gpu-sanitize gpu-test gpu-bench,$(each) $(each)-here)
.DEFAULT_GOAL := help

help:
	@echo 'make demo    train a real model through pyrx: table and loss curves       (5 minutes after the build)'
	@echo 'make test    build, lint, types, C++ tests with sanitizers, pytest        (half an hour from a clean clone)'
	@echo 'make test-large  tensors past 2^31 elements, 10000 calls of every op (half an hour, 16 GiB of memory)'
	@echo 'make test-threads  what shares memory between threads, under ThreadSanitizer  (10 minutes after its build)'
	@echo 'make test-cuda-host  CUDA kernels and what launches them, without a GPU, under sanitizers  (20 minutes after its build)'
	@echo 'make fuzz    call every public function at random, FUZZ_CASES=$(FUZZ_CASES) times, FUZZ_SEED=$(FUZZ_SEED)  (10 minutes)'
	@echo 'make fuzz-sanitize  fewer calls of the extension under AddressSanitizer and UBSan  (10 minutes after its build)'
	@echo 'make bench   time every op against PyTorch and peers, tables and charts    (40 minutes)'
	@echo 'make bench-compare BASE=<commit> [K=<filter>]: what is slower than there  (20 minutes for every case)'
	@echo 'make gpu     on a machine with a CUDA GPU: build, gpu tests, benchmarks   (10 minutes, no network needed)'
	@echo '             and its parts: make gpu-build, gpu-sanitize, gpu-test, gpu-bench  (each under 10 minutes)'
	@echo 'make gpu-model  predict the GPU kernels'"'"' times from their machine code   (no GPU; 10 minutes after the build)'
	@echo 'make dist    the source archive and the wheel, checked and tried in new environments'
	@echo 'make docs    the documentation, every example in it run: build/docs/html  (2 minutes)'
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

test-large: $(call extras,test) build
	$(call say,'pytest on tensors past 2^31 elements and on 10000 calls of every op (half an hour, 16 GiB of memory)')
	@$(PY) -m pytest -q -m 'large and not gpu'

fuzz: $(call extras,test) build
	$(call say,'fuzzing: $(FUZZ_CASES) random calls from seed $(FUZZ_SEED) against the reference (10 minutes)')
	@FUZZ_CASES=$(FUZZ_CASES) PYRX_REQUIRE=cpu $(PY) -m pytest -v --no-header --tb short tests/fuzz \
	  -n $(TEST_JOBS) --dist worksteal --hypothesis-profile fuzz --hypothesis-seed $(FUZZ_SEED)

# what python preloads for a module under AddressSanitizer
SANITIZER_LIBRARIES = $$(case "$${CXX:-g++}" in (*clang*) libraries='clang_rt.asan-x86_64 stdc++';; (*) libraries='asan ubsan stdc++';; esac; \
  for each in $$libraries; do $${CXX:-g++} -print-file-name=lib$$each.so; done | xargs)

# AVX-512 by clang alone (CXX=clang++-19): g++'s sanitizer does not see its masked loads and stores, and g++ 12 keeps half of a
# spilled mask at -O1
fuzz-sanitize: FUZZ_CASES := 1260
fuzz-sanitize: $(call extras,test)
	$(call say,'the extension under AddressSanitizer and UndefinedBehaviorSanitizer (10 minutes the first time)')
	@FORCE_CUDA=0 SANITIZE=memory $(PY) setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	@export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:verify_asan_link_order=0:log_path=$(CURDIR)/build/sanitize/found; \
	export UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/build/sanitize/found; \
	case "$${CXX:-g++}" in (*clang*) sets='avx512 avx2 default';; (*) sets='avx2 default';; esac; \
	preload=$(SANITIZER_LIBRARIES); \
	rm -f build/sanitize/found*; cd build/sanitize/lib; \
	for isa in $$sets; do \
	  printf '\n== fuzzing under sanitizers: %s\n' "$$isa"; \
	  ATEN_CPU_CAPABILITY=$$isa LD_PRELOAD=$$preload FUZZ_CASES=$(FUZZ_CASES) PYRX_REQUIRE=cpu $(PY) -m pytest -q --no-header --tb short \
	    '$(CURDIR)/tests/fuzz' -n $(TEST_JOBS) --dist worksteal --hypothesis-profile fuzz --hypothesis-seed $(FUZZ_SEED) || \
	    { cat ../found* 2>/dev/null || true; exit 1; }; \
	done

# at::parallel_for by std::thread (tests/cpp/threads): ThreadSanitizer does not see what OpenMP's runtime waits for
test-threads: FUZZ_CASES := 1260
test-threads: $(call extras,test)
	$(call say,'the extension under ThreadSanitizer (10 minutes the first time)')
	@FORCE_CUDA=0 SANITIZE=threads $(PY) setup.py -q build --build-base build/threads --build-lib build/threads/lib
	@export TSAN_OPTIONS=ignore_noninstrumented_modules=1:exitcode=66:log_path=$(CURDIR)/build/threads/found; \
	export LD_PRELOAD=$$($${CXX:-g++} -print-file-name=libtsan.so) OMP_NUM_THREADS=4 FUZZ_CASES=$(FUZZ_CASES) PYRX_REQUIRE=cpu; \
	rm -f build/threads/found*; cd build/threads/lib; failed=0; \
	run() { $(PY) -m pytest -q --no-header --tb short -n $(TEST_JOBS) --dist worksteal "$$@" || failed=$$?; }; \
	for isa in avx2 default; do \
	  printf '\n== under ThreadSanitizer: %s\n' "$$isa"; export ATEN_CPU_CAPABILITY=$$isa; \
	  run '$(CURDIR)/tests' -m 'not gpu and not slow' -k '(thread or chunk) and not triton and not make'; \
	  run '$(CURDIR)/tests/fuzz' --hypothesis-profile fuzz --hypothesis-seed $(FUZZ_SEED); \
	done; \
	if compgen -G '../found*' >/dev/null; then cat ../found*; exit 66; fi; exit $$failed

# csrc/cuda in the place of csrc/cpu, launches and all (tests/cpp/cuda_host): the CPU's tests are then of CUDA's ops
HOST_TESTS = not (triton or attention or search or compile or examples or docs or release or bench or instructions or build or \
  threads or memory)
test-cuda-host: FUZZ_CASES := 1260
test-cuda-host: $(call extras,test)
	$(call say,'CUDA kernels on the host under AddressSanitizer and UndefinedBehaviorSanitizer (20 minutes)')
	@$(PY) tests/cpp/cuda_host/translate.py build/cuda-host/cuda
	@FORCE_CUDA=0 SANITIZE=cuda $(PY) setup.py -q build --build-base build/cuda-host --build-lib build/cuda-host/lib
	@options='detect_leaks=0:allocator_may_return_null=1:verify_asan_link_order=0:detect_stack_use_after_return=0'; \
	export ASAN_OPTIONS=$$options UBSAN_OPTIONS=print_stacktrace=1 ATEN_CPU_CAPABILITY=avx2 FUZZ_CASES=$(FUZZ_CASES) PYRX_REQUIRE=cpu; \
	preload=$(SANITIZER_LIBRARIES); export LD_PRELOAD="$$preload"; \
	run() { $(PY) -m pytest -q --no-header --tb short -n $(TEST_JOBS) --dist worksteal "$$@"; }; \
	cd build/cuda-host/lib; \
	run '$(CURDIR)/tests' -m 'not gpu and not slow and not cpu_kernels' -k '$(HOST_TESTS)' --ignore '$(CURDIR)/tests/fuzz'; \
	run '$(CURDIR)/tests/fuzz' --hypothesis-profile fuzz --hypothesis-seed $(FUZZ_SEED)

bench: $(call extras,bench)
	$(call say,'benchmarks (about 40 minutes on 2 cores): results in bench/results')
	@$(PY) bench/run.py
	@$(PY) bench/report.py

# BASE: the commit to compare with; K: only the cases whose name matches
bench-compare: $(call extras,bench) build
	@test -n '$(BASE)' || { echo 'make bench-compare BASE=<commit> [K=<filter>]'; exit 2; }
	$(call say,'case by case against $(BASE)')
	@$(PY) bench/compare.py '$(BASE)' $(if $(K),-k '$(K)')

# an environment made before wins, then a system Python whose torch sees a GPU, then a new environment
gpu gpu-build gpu-test gpu-bench gpu-sanitize:
	@if [ '$(TORCH_SYSTEM)' != 1 ] && [ ! -e '$(ENVIRONMENT)' ] && \
	  $(PYTHON) -c '$(HAS_TORCH); import pytest; assert torch.cuda.is_available()' 2>/dev/null; \
	then echo "== using $$(command -v $(PYTHON)): its torch sees a GPU, so nothing is downloaded"; \
	  $(MAKE) $@-here TORCH_SYSTEM=1; \
	else $(MAKE) $@-here; fi

# the benchmarks run also when a test failed, in the time that the build left; the exit status tells of all
gpu-here: export GPU_STARTED := $(shell date +%s)
gpu-here: gpu-build-here
	@failed=0; export GPU_BUILT=; \
	$(MAKE) gpu-sanitize-here SANITIZE_SECONDS=40 || failed=$$?; \
	$(MAKE) gpu-test-here GPU_TEST_SECONDS=180 || failed=$$?; \
	left=$$((GPU_STARTED + 520 - $$(date +%s))); \
	$(MAKE) gpu-bench-here GPU_BENCH_MINUTES=$$($(PY) -c "print(round(max($$left, 60) / 60, 1))") || failed=$$?; \
	exit $$failed

gpu-build-here: $(call extras,test) $(call extras,bench) build

# every row first, so that a run that the time limit cuts short has seen them all; interrupted, pytest tells what failed
gpu-test-here: $(GPU_BUILT)
	$(call say,'gpu tests (up to $(GPU_TEST_SECONDS) seconds)')
	@jobs=$$($(PY) -c 'import xdist' 2>/dev/null && echo '-n 8' || true); \
	timeout -s INT -k 30 $(GPU_TEST_SECONDS) $(PY) -m pytest -q -m gpu $$jobs tests/test_gpu_rows.py tests

gpu-bench-here: $(GPU_BUILT)
	$(call say,'GPU benchmarks (up to $(GPU_BENCH_MINUTES) minutes): results in bench/results')
	@failed=0; \
	timeout -k 10 $$($(PY) -c 'print(60 * $(GPU_BENCH_MINUTES) + 30)') \
	  $(PY) bench/run.py --device cuda --out bench/results --minutes $(GPU_BENCH_MINUTES) || failed=$$?; \
	$(PY) bench/report.py || failed=$$?; \
	exit $$failed

# of the CUDA kernels alone, where the tool is there and the machine lets it look
gpu-sanitize-here: $(GPU_BUILT)
	$(call say,'compute-sanitizer over the CUDA kernels (up to twice $(SANITIZE_SECONDS) seconds)')
	@toolkit=$$($(PY) -c 'import json; print(json.load(open("pyrx/_build_info.json"))["nvcc"]["toolkit"])'); \
	export PATH="$$PATH:$$toolkit/bin:$$toolkit/compute-sanitizer"; \
	command -v compute-sanitizer >/dev/null || { echo "not run: compute-sanitizer is neither on the PATH nor in $$toolkit"; exit 0; }; \
	compute-sanitizer $(PY) -c 'import torch; torch.zeros(1, device="cuda").sum()' >/dev/null 2>&1 || \
	  { echo 'not run: compute-sanitizer does not work with this device'; exit 0; }; \
	for tool in memcheck racecheck; do \
	  echo "$$tool"; status=0; \
	  timeout -k 10 $(SANITIZE_SECONDS) compute-sanitizer --tool $$tool --error-exitcode 9 --kernel-regex kns=_ZN4pyrx4cuda \
	    $(PY) -m pytest -q -p no:cacheprovider -m gpu -k 'reference_s_values and cuda]' tests/test_gpu_rows.py || status=$$?; \
	  case $$status in 0) ;; 124|137) echo "$$tool: stopped after $(SANITIZE_SECONDS) seconds, nothing found so far";; *) exit $$status;; esac; \
	done

dist: $(call extras,dist)
	$(call say,'source archive and wheel (some minutes to build and check them and to install them elsewhere)')
	@$(PY) tests/release.py

docs: $(call extras,docs) build
	$(call say,'the examples of the docs')
	@PYRX_REQUIRE=docs $(PY) -m pytest -q tests/test_docs.py
	$(call say,'the pages: build/docs/html/index.html')
	@rm -rf docs/reference/generated docs/_figures
	@$(PY) -m sphinx -q -E -W --keep-going -n -b html docs build/docs/html

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

# builds the CUDA kernels of both architectures, with pip's nvcc where there is no other
gpu-model: $(call extras,test) $(call extras,model)
	$(call say,'the extension for sm_80 and sm_90 (15 minutes on two cores)')
	@FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST='8.0;9.0' $(PY) setup.py build_ext --inplace
	$(call say,'the model: results in bench/gpu_model.md (4 minutes)')
	@$(PY) bench/gpu_model.py

clean:
	rm -rf build dist pyrx.egg-info pyrx/_C*.so pyrx/_build_info.json docs/reference/generated docs/_figures
