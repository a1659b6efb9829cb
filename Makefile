SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
OLDEST ?= python3.10
KAGGLE_PYTHON ?= python3.12
VENV ?= .venv
# one thread per process, one process per core, at most four (each holds a torch of about 1 GB)
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(max(1, min(4, os.cpu_count() or 1)))')
STAMP := $(VENV)/.installed
BENCH := $(VENV)/.bench
# the tests of a file run in one process, and the longest files begin first (tests/conftest.py)
PYTEST_N := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15
# the benchmarks of speed; `make bench` runs them one after the other
SPEED := loading training inference assignment index screens store16
RUN := PATH="$$(cd $(VENV)/bin && pwd):$$PATH"
RUN1 := $(RUN) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# what `make export` writes, and the few files it needs to do so
GENERATED := nbs rcic_fastai README.md docs/readme
EXPORT_NEEDS := $(GENERATED) Makefile pyproject.toml tools

.PHONY: help
help: ## list these targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-18s %s\n", $$1, $$2}'

$(STAMP): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10) and f"$(PYTHON) is Python {v[0]}.{v[1]}; this project needs 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -e '.[dev]'
	@touch $@

.PHONY: install
install: $(STAMP) ## create .venv, install the package with its development tools and nbdev's git hooks (once)
	@[ ! -d .git ] || $(RUN) nbdev-install-hooks

.PHONY: demo
demo: $(STAMP) ## simulate a screen, pack, train, predict, assign, score; ends with the table and the run folder (ARGS="--seed 1")
	@$(RUN) rcic-demo $(ARGS)

.PHONY: test
test: $(STAMP) lint check browser test-nbs ## what CI runs: lint, export and clean without a diff, every notebook, pytest
	@$(RUN1) python -m pytest $(PYTEST_N) $(ARGS)

.PHONY: quick
quick: $(STAMP) ## pytest without what is slow: no notebooks, no browser, no kills, none of the long runs (ARGS="-k store")
	@$(RUN1) python -m pytest $(PYTEST_N) -m 'not slow and not bench' $(ARGS)

.PHONY: test-bf16
test-bf16: $(STAMP) ## what computes with a network, with bfloat16 wherever a recipe leaves the precision open, on any processor
	@RCIC_BF16=on $(RUN1) python -m pytest $(PYTEST_N) $(ARGS)

.PHONY: browser
browser: $(STAMP) ## find or install the Chromium that looks at reports and at the documentation in the tests
	@$(RUN) python tools/browser.py --optional

.PHONY: types
types: $(STAMP) ## mypy over the package
	@$(RUN) mypy rcic_fastai

.PHONY: imports
imports: $(STAMP) ## draw which room imports which: rooms, floors, arrows, and their counts (ARGS=--modules)
	@$(RUN) python tools/imports.py $(ARGS)

.PHONY: docs
docs: $(STAMP) ## the static site of the documentation in _site, from the notebooks with their stored outputs; link-checked
	@$(RUN) python tools/docs.py $(ARGS)

.PHONY: dist
dist: $(STAMP) ## wheel and sdist in dist, checked, and the demo on a tiny screen in an environment that has nothing but the wheel
	rm -rf dist build
	@$(RUN) python -m build
	@$(RUN) twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet dist/*.whl
	cd build && wheel/bin/rcic-demo --tiny --out tiny
	rm -rf build

.PHONY: test-oldest
test-oldest: ## pytest with the oldest releases that settings.ini permits (OLDEST=python3.10)
	$(OLDEST) tools/oldest.py build/oldest
	OMP_NUM_THREADS=1 PATH="$$PWD/build/oldest/bin:$$PATH" build/oldest/bin/python -m pytest $(PYTEST_N) $(ARGS)

.PHONY: test-kaggle
test-kaggle: ## kernels, reports and commands in an environment like Kaggle's image, in build/kaggle (KAGGLE_PYTHON=python3.12; 8 GB)
	$(KAGGLE_PYTHON) tools/kaggle_image.py build/kaggle
	OMP_NUM_THREADS=1 PATH="$$PWD/build/kaggle/bin:$$PATH" build/kaggle/bin/pytest $(PYTEST_N) $(or $(ARGS),tests/test_kaggle.py tests/test_report.py tests/test_cli.py)

$(BENCH): $(STAMP)
	$(VENV)/bin/python -m pip install -e '.[dev,bench]'
	@touch $@

.PHONY: bench
bench: $(if $(filter-out $(SPEED) gpu,$(NAME)),$(STAMP),$(BENCH)) ## the benchmarks of speed, or those of NAME; tables in benchmarks/results (NAME=hpa ARGS="--seeds 7")
	@for name in $(or $(NAME),$(SPEED)); do $(RUN) python benchmarks/$$name.py $(ARGS); done

.PHONY: benches
benches: ## list the names that `make bench NAME=...` takes
	@for f in benchmarks/*.py; do if grep -q __main__ $$f; then printf '%-14s %s\n' $$(basename $$f .py) "$$(head -1 $$f | tr -d '"')"; fi; done

.PHONY: lint
lint: $(STAMP) ## ruff: the library, setup.py, tests, tools and benchmarks
	@$(RUN) ruff check

.PHONY: check
check: $(STAMP) ## modules, README and notebooks are what `make export` makes of them (works on a copy)
	@copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	for f in $(EXPORT_NEEDS); do if [ -e $$f ]; then mkdir -p "$$copy/$$(dirname $$f)"; cp -R $$f "$$copy/$$(dirname $$f)/"; fi; done; \
	$(MAKE) --no-print-directory -C "$$copy" export-here VENV="$$(cd $(VENV) && pwd)"; \
	same=1; for f in $(GENERATED); do \
		[ ! -e $$f ] && [ ! -e "$$copy/$$f" ] && continue; \
		found=$$(diff -rq -x __pycache__ -x .ipynb_checkpoints -x .last_checked $$f "$$copy/$$f" 2>&1) || { same=0; \
		echo "$$found" | sed -e "s#^Files \(.*\) and .* differ#  \1#" -e "s#^Only in $$copy/*#  missing here: #" -e "s#^Only in #  not made by export: #"; }; done; \
	[ $$same = 1 ] || { echo 'make check: the files above are not what `make export` makes of the notebooks: run it and look at the diff'; exit 1; }
	@echo 'make check: exported, clean, README up to date'

.PHONY: test-nbs
test-nbs: $(STAMP) ## run every notebook, tutorials included, without changing it
	@$(RUN1) nbdev-test --n-workers $(WORKERS) --timing

.PHONY: export
export: $(STAMP) export-here ## notebooks to modules, cleaned; README.md from nbs/index.ipynb

.PHONY: export-here
export-here:
	@$(RUN) nbdev-export
	@$(RUN) nbdev-clean
	@$(RUN) python tools/readme.py

.PHONY: readme
readme: $(STAMP) ## README.md and its pictures from nbs/index.ipynb
	@$(RUN) python tools/readme.py

.PHONY: notebooks
notebooks: $(STAMP) ## run every notebook in its own kernel, store its outputs, then export
	@find nbs -name '*.ipynb' -not -path '*/.*' -print0 | $(RUN1) PYTHONWARNINGS=ignore TQDM_DISABLE=1 xargs -0 -n 1 -P $(WORKERS) \
		jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=900 --log-level WARN
	@$(MAKE) --no-print-directory export-here

.PHONY: clean
clean: ## remove caches and build output (keeps .venv, data and runs)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache _proc _site
	find nbs rcic_fastai tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
