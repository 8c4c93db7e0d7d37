# Two commands do everything: `make demo` and `make test`. The environment is made in .venv, once.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH ?= torch==2.13.0
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)

# Threads that wait for work sleep: with as many threads as cores, spinning ones are in the way.
export OMP_WAIT_POLICY = passive

.PHONY: install demo test mutate lint bench gpu clean

install: $(VENV)/installed

# torch first and on its own: what follows then takes the one that is there.
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) -m venv failed: on Debian, apt install python3-venv python3-dev g++"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[train,test,bench,lint]"
	touch $@

demo: install
	$(BIN)/python -m fastlm.training.demo
	$(BIN)/python -m benchmarks --quick

# Two processes: compiling for the emulator keeps one core busy.
test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Breaks one constant per kernel and expects the tests to see it; about six minutes.
mutate: install
	$(BIN)/python tests/mutate.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'fastlm/emulator/runtime/*' 'fastlm/emulator/cudart/*')

bench: install
	$(BIN)/python -m benchmarks

# On a machine with CUDA, with the Python that is active and nothing downloaded: build, test on the GPU,
# look for wild accesses and races on small shapes, measure. Results lie in out/gpu; a failing step
# lets the next ones run, and fails the whole.
gpu:
	FASTLM_CUDA=1 $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	mkdir -p out/gpu
	$(PYTHON) -m fastlm info | tee out/gpu/info.txt
	status=0; \
	timeout 200 $(PYTHON) -m pytest -k "cuda or triton or gpu" --junitxml=out/gpu/tests.xml tests --ignore=tests/cuda --ignore=tests/emulator || status=1; \
	timeout 60 $(PYTHON) -m pytest -k "on_gpu or on_a_gpu" --junitxml=out/gpu/on_gpu.xml tests/cuda/test_on_gpu.py tests/emulator/test_instructions.py || status=1; \
	for tool in memcheck racecheck; do \
	  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; break; }; \
	  timeout 60 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -k "as_accurate and cuda and (affine or mean or causal) and bfloat16" tests >out/gpu/$$tool.txt 2>&1 || status=1; \
	done; \
	$(PYTHON) -m benchmarks.gpu --out out/gpu --seconds 150 || status=1; \
	exit $$status

clean:
	rm -rf build dist out $(VENV) fastlm/*.so fastlm.egg-info
