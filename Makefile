# Everything here runs from a fresh clone with Python >= 3.11, make and a network.
PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.lock)
TESTS ?=
RAY_TESTS := tests/integration/test_ray_serve.py

.DEFAULT_GOAL := help

.PHONY: help setup demo up down test integration check format bench conformance models schemas proto lock servers hooks clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null || sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1    \2/p' $(MAKEFILE_LIST)

setup: .venv/.ready ## Build .venv from requirements.lock

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Millrace needs Python 3.11 or newer; '$(PYTHON)' is older. Set PYTHON=/path/to/python3.11." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "'$(PYTHON) -m venv' failed; install the venv module of your Python (Debian: python3-venv)." >&2; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "Ready: $(BIN)/millrace"

demo: setup ## The whole story on real data: a model from a file to live predictions
	@$(BIN)/millrace demo $(ARGS)

up: setup ## Start the platform on this machine (Ctrl-C or 'make down' stops it)
	@$(BIN)/millrace up $(ARGS)

down: setup ## Stop the platform on this machine
	@$(BIN)/millrace down $(ARGS)

test: setup ## Tests without Docker and Java, under five minutes
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile $(TESTS)

servers: setup ## Build the S3 server and the Jaeger that integration tests use (once; needs Go)
	@$(BIN)/python -m tests.integration.servers build

# Those on Ray run in a process of their own: warnings are errors in all others, and Ray leaves some behind.
integration: setup servers ## Tests against a real Kafka, S3 server and Jaeger
ifeq ($(TESTS),)
	@$(BIN)/python -m pytest -q -m "integration or e2e" --ignore $(RAY_TESTS)
	@$(BIN)/python -m pytest -q -m "integration or e2e" $(RAY_TESTS)
else
	@$(BIN)/python -m pytest -q -m "integration or e2e" $(TESTS)
endif

check: setup ## Format, lint, types, import rules, contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m schemas.generate --check
	@$(BIN)/python -m libs.inference.oip_proto.generate --check
	@$(BIN)/python -m libs.settings_tables --check
	@$(BIN)/python -m libs.metrics.reference --check

format: setup ## Format and fix what can be fixed
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

bench: setup ## Measure: the gateway beside its peers, start-up, upload to prediction, rebuild (an hour)
	@$(BIN)/python -m benchmarks

conformance: setup ## Try the published protocols out on Millrace, MLServer and KServe; writes docs/conformance.md
	@$(BIN)/python -m tests.conformance --table docs/conformance.md

models: setup ## Ask models that people have through every protocol; writes docs/models.md
	@$(BIN)/python -m tests.models --table docs/models.md

schemas: setup ## Rewrite what is generated: snapshots, AsyncAPI document, event reference, settings tables
	@$(BIN)/python -m schemas.generate
	@$(BIN)/python -m libs.settings_tables
	@$(BIN)/python -m libs.metrics.reference

proto: setup ## Generate the Python of the .proto files
	@$(BIN)/python -m libs.inference.oip_proto.generate

lock: ## Resolve the dependencies again
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes --no-emit-index-url --no-annotate --no-header --upgrade pyproject.toml --output-file requirements.lock

hooks: setup ## Install the pre-commit hooks
	@$(BIN)/pre-commit install

clean: ## Remove .venv and caches (not .millrace)
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
