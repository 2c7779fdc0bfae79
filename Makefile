# Everything happens in .venv; Python 3.11 or later and make are all that is needed.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready
SEEDS ?= 1000000
MINUTES ?= 10

.PHONY: help venv test simulate soak proof lint format proto demo clean

help: ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(READY) ## a virtual environment in .venv with all that is needed

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "txrpc needs Python 3.11 or later; set PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: txrpc needs Python 3.11 or later"; exit 1; }
	@echo "Setting up .venv with $(PYTHON) ..."
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

test: $(READY) ## run the tests (real processes and a real, private PostgreSQL)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not serial and not cells" -q
	$(BIN)/python -m pytest -n 3 --dist load -m cells -q
	$(BIN)/python -m pytest -m serial -q

simulate: $(READY) ## SEEDS=1000000 simulated worlds, on all processors
	$(BIN)/python -m txrpc.testing.simulate --seeds $(SEEDS)

soak: $(READY) ## MINUTES=10 of mixed load and faults on real processes, and what came of it
	$(BIN)/python -m tests.system.soak --minutes $(MINUTES)

proof: $(READY) ## run the tests and write the tables of docs/testing.md
	rm -rf build/proof
	TXRPC_PROOF_DIR=$(CURDIR)/build/proof $(MAKE) test
	$(BIN)/python scripts/proof.py build/proof

lint: $(READY) ## check style, types, import rules, generated code and the house rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate.py --check
	$(BIN)/python -m pytest -q tests/house

format: $(READY) ## let ruff format and sort
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(READY) ## generate the protobuf modules from protos/ and examples/
	$(BIN)/python scripts/generate.py

demo: $(READY) ## transfers between two banks while services, a database and the coordinator are killed
	@GRPC_VERBOSITY=ERROR GRPC_ENABLE_FORK_SUPPORT=0 $(BIN)/python -m examples.bank.demo

clean: ## delete what the other targets made
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
