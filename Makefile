# Two commands do everything: `make demo` and `make test`. The environment is made in .venv, once.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
TORCH ?= torch==2.13.0
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)

.PHONY: install demo test mutate sanitize lint bench gpu clean

install: $(VENV)/installed

# torch first and on its own: what follows then takes the one that is there. Modules are compiled when
# they are imported, as most never are.
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) -m venv failed: on Debian, apt install python3-venv python3-dev g++"; exit 1; }
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable ".[train,test,bench,lint]"
	touch $@

demo: install
	$(BIN)/python -m fastlm.training.demo
	$(BIN)/python -m benchmarks --quick

# Two processes: compiling for the emulator keeps one core busy. With more threads than cores, those
# that wait for work sleep; alone, a product of many small steps would take a third longer so.
test: export OMP_WAIT_POLICY = passive
test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Breaks one constant per kernel and expects the tests to see it; about ten minutes.
mutate: install
	$(BIN)/python tests/mutate.py

# The CPU kernels with GCC's address, undefined and thread sanitizers.
sanitize: install
	$(BIN)/python tests/sanitize.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'fastlm/emulator/runtime/*' 'fastlm/emulator/cudart/*')

bench: install
	$(BIN)/python -m benchmarks

# On a machine with CUDA, with the Python that is active and nothing downloaded: build, test on the GPU,
# look for wild accesses and races on small shapes, measure. Results lie in out/gpu; a failing step
# lets the next ones run, and fails the whole. The limits add up to 8 minutes: what is stopped by one
# is interrupted, so that it still writes what it has.
# Files whose imports are not installed there (transformers) fail alone.
GPU_TESTS = --continue-on-collection-errors -k "cuda or triton or gpu or hopper" tests --ignore=tests/cuda --ignore=tests/emulator --ignore=tests/triton_kernels
ON_GPU = -k "on_gpu or on_a_gpu" tests/cuda/test_on_gpu.py tests/emulator/test_instructions.py
SMALL = tests/test_layer_norm.py tests/test_cross_entropy.py tests/test_attention.py
SANITIZED = -k "as_accurate and cuda and bfloat16 and (affine or long-rows or mean or causal or wide-heads)" $(SMALL)
# torch's allocator cuts tensors out of large blocks: past the end of one is inside another.
UNCACHED = PYTORCH_NO_CUDA_MEMORY_CACHING=1
UNTIL = timeout --signal=INT --kill-after=10

gpu: export OMP_NUM_THREADS = 2
gpu:
	FASTLM_CUDA=1 $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	mkdir -p out/gpu
	$(PYTHON) -m fastlm info | tee out/gpu/info.txt
	status=0; \
	several=$$($(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8 --dist worksteal"); \
	$(UNTIL) 150 $(PYTHON) -m pytest $$several --junitxml=out/gpu/tests.xml $(GPU_TESTS) || status=1; \
	$(UNTIL) 50 $(PYTHON) -m pytest --junitxml=out/gpu/on_gpu.xml $(ON_GPU) || status=1; \
	for tool in memcheck racecheck; do \
	  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; break; }; \
	  $(UNCACHED) $(UNTIL) 45 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest $(SANITIZED) >out/gpu/$$tool.txt 2>&1 || status=1; \
	  tail -n 2 out/gpu/$$tool.txt; \
	done; \
	$(UNTIL) 180 $(PYTHON) -m benchmarks.gpu --out out/gpu --seconds 150 || status=1; \
	exit $$status

clean:
	rm -rf build dist out $(VENV) fastlm/*.so fastlm.egg-info
