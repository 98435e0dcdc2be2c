# `make` alone prints this help.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A package index that has CPU builds of torch, where PyPI's is not one: make setup TORCH_INDEX=URL
TORCH_INDEX ?=
RECIPE ?= smollm2_eagle3
ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# Where Python may not write bytecode, vLLM compiles itself anew for a minute at every start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test check fmt clean

help: ## what each target does
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(VENV)/.ready ## .venv from requirements-cpu.lock, exact versions, nothing resolved

$(VENV)/.ready: requirements-cpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# Two halves at a time, since pip unpacks one package after the other.
	printf '0\n1\n' | xargs -P 2 -I{} sh -c "awk 'NR % 2 == {}' requirements-cpu.lock > $(VENV)/half-{}.txt && \
	  $(PIP) install --no-deps --no-compile -r $(VENV)/half-{}.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))"
	$(PIP) install --no-deps --no-build-isolation -e .
# The packages that an engine loads most of, on every core at once; the others are compiled when they are first
# imported. Templates that some ship are no Python: their errors mean nothing.
	for name in torch vllm transformers sympy openai; do echo $(VENV)/lib/python3.*/site-packages/$$name; done \
	  | xargs $(BIN)/python -m compileall -qq -j 0 || true
	touch $@

demo: setup ## the main job: SmolLM2, ShareGPT, vLLM, an EAGLE-3 draft, measured
	$(BIN)/speculators-run recipe=$(RECIPE) $(ARGS)

test: setup ## every test that needs no GPU, the whole pipeline on the real engine included
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup ## lint, format, types, layers, budgets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py tests/test_budgets.py

fmt: setup ## format and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv and caches; artifacts and runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
