# Two commands matter: `make demo` and `make test`. Both set up `.venv` first.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --timeout 600
WITHOUT_THREADS := OMP_NUM_THREADS=1

.PHONY: help setup demo test test-oldest lint gpu clean

help: ## say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed ## create .venv with everything that demo and test need

$(VENV)/.installed: pyproject.toml setup.py $(CONSTRAINTS)
	@echo 'installing PyTorch and all that demo and test need into $(VENV): some 6 GB, a few minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@
	@echo "ready; '. $(BIN)/activate' puts detr-fast and python on your PATH"

demo: setup ## train a small DETR on generated scenes, evaluate it and draw its predictions (QUICK=1: a minute or two)
	$(BIN)/detr-fast demo $(if $(QUICK),--quick)

test: setup ## the whole test suite: kernels in Triton's interpreter, then everything else, JOBS processes each
	$(WITHOUT_THREADS) TRITON_INTERPRET=1 $(PYTEST) -m 'interpreter and not gpu'
	$(WITHOUT_THREADS) $(PYTEST) -m 'not interpreter and not gpu'

test-oldest: ## the suite on the oldest supported torch and triton
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: ## on a machine with a GPU (no network needed): tests, benchmarks, results in OUT
	$(PYTHON) benchmarks/gpu.py $(if $(OUT),--out $(OUT)) $(if $(ONLY),--only $(ONLY))

clean: ## remove what setup and test have made
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
