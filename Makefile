# make demo and make test each make their own .venv first: all they need is Python 3.11 or newer, and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUT ?= out
BUDGET ?= 330
CODE := src tests benchmarks scripts

# quiet, but for what goes wrong
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test lint types systems compatibility docs bench clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-13s %s\n' "$$name" "$$what"; done

demo: $(READY) ## tunes the embedded pipeline and shows what it gained, into out/
	$(BIN)/hasten tune emoji-flow --quality 0.95 --out $(OUT)/ --budget-seconds $(BUDGET)

test: lint types .venv/.kernels ## lint, types, every test
	$(BIN)/python -m pytest

lint: $(READY) ## ruff alone
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(READY) ## mypy alone
	$(BIN)/mypy

systems: $(READY) ## the ledger: which rows of docs/systems.csv are proved, claimed, open
	$(BIN)/python scripts/systems.py

compatibility: $(READY) ## every method on every family, every pair of methods; keeps the table
	$(BIN)/python scripts/compatibility.py

docs: .venv/.docs ## the pages, into site/
	$(BIN)/python scripts/docs_tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

bench: $(READY) ## every benchmark; keeps benchmarks/results/*.json
	@set -e; for script in benchmarks/*.py; do echo "$$script ..."; $(BIN)/python "$$script"; done

clean: ## .venv, caches and what was built; kept results stay
	rm -rf .venv site dist build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is older than what it was made from after a pull: then the same .venv is brought up to date.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "hasten needs Python 3.11 or newer, and '$(PYTHON)' is $$(command -v $(PYTHON) >/dev/null && $(PYTHON) -V 2>&1 || echo not there); try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "making .venv ..."
	@$(PYTHON) -m venv .venv
	@echo "installing torch (the largest part) ..."
	@$(PIP) install torch==2.13.0 -c constraints.txt
	@echo "installing hasten and what it needs ..."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
	@echo ".venv is ready"

# tests run Triton's kernels in its interpreter
.venv/.kernels: $(READY)
	@echo "installing triton ..."
	@$(PIP) install -c constraints.txt -e '.[kernels]'
	@touch $@

.venv/.docs: $(READY)
	@echo "installing mkdocs ..."
	@$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@
