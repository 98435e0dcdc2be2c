# `make` alone prints this help.
# The first Python on the path that the lock was resolved for; another one: make setup PYTHON=python3.12
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
  "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo "$$p" && exit; done; echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
# A package index that has torch's CPU build. Without one, PyTorch's own is tried, then PyPI's build with CUDA libraries.
TORCH_INDEX ?=
RECIPE ?= smollm2_eagle3
ARGS ?=
PYTHONS := 3.11 3.12 3.13
PLATFORMS := x86_64-manylinux_2_31 aarch64-manylinux_2_31

ifneq ($(words $(VENV)),1)
$(error VENV may not hold spaces: $(VENV))
endif
# `make -j clean setup` in this order.
.NOTPARALLEL:

# Where Python may not write bytecode, vLLM compiles itself anew for a minute at every start.
export PYTHONDONTWRITEBYTECODE :=
# The checkout is imported from the directory that make runs in.
export PYTHONSAFEPATH :=
unexport PYTHONHOME

.PHONY: help setup lock demo test check fmt clean

help: ## what each target does
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

# A Python that is asked for by name, and is not the one of an environment that is there, is not passed over.
ifneq ($(filter command environment,$(firstword $(origin PYTHON))),)
setup: same-python
endif
.PHONY: same-python
same-python:
	@command -v "$(PYTHON)" > /dev/null || { printf >&2 \
	  "error: there is no $(PYTHON)\n\nhint: make setup PYTHON=PATH, a Python from 3.11 to 3.13\n"; exit 1; }
	@test ! -x $(BIN)/python || test "$$($(BIN)/python -V)" = "$$("$(PYTHON)" -V)" || { printf >&2 \
	  "error: $(VENV) has $$($(BIN)/python -V), not $$("$(PYTHON)" -V)\n\nhint: make clean setup PYTHON=$(PYTHON), or VENV=DIRECTORY for a second one\n"; exit 1; }

setup: $(VENV)/.ready ## .venv from requirements-cpu.lock, exact versions, nothing resolved

$(VENV)/.ready: requirements-cpu.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit("error: this is Python %s\n\nhint: make setup PYTHON=PATH, a Python from 3.11 to 3.13" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@"$(PYTHON)" -m speculators.runner.environment '$(VENV)' '$(TORCH_INDEX)'

lock: setup ## resolve requirements-cpu.lock again; ARGS=--upgrade takes the newest versions
	$(BIN)/python -m pip install -q uv
	cp requirements-cpu.lock $(VENV)/resolved.txt
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev --universal --python-version $(firstword $(PYTHONS)) \
	  --no-annotate --no-header -q -o $(VENV)/resolved.txt $(ARGS) \
	  $(foreach name,torchvision torchaudio torchcodec,--no-emit-package $(name))
	@for python in $(PYTHONS); do for platform in $(PLATFORMS); do \
	  $(BIN)/uv pip install -q --dry-run --no-deps --only-binary :all: --no-binary antlr4-python3-runtime \
	    --target $(VENV)/nowhere --python-version $$python --python-platform $$platform -r $(VENV)/resolved.txt \
	    || exit 1; done; done
	sed -n '/^# python/q; p' requirements-cpu.lock > $(VENV)/header.txt
	(cat $(VENV)/header.txt; echo '# python: $(PYTHONS)'; echo '# platform: $(PLATFORMS)'; \
	  grep -v "^#\|sys_platform == '\(win32\|emscripten\)'" $(VENV)/resolved.txt) > requirements-cpu.lock

demo: setup ## the main job: SmolLM2, ShareGPT, vLLM, an EAGLE-3 draft, measured
	$(BIN)/speculators-run recipe=$(RECIPE) $(ARGS)

test: setup ## every test that needs no GPU, the whole pipeline on the real engine included
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup ## lint, format, types, layers, budgets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py tests/test_budgets.py

fmt: setup ## format, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv and caches; artifacts and runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
