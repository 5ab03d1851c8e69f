# One door each: run, test, lint, bench. Each does all of its own set-up, so it works on a fresh checkout.

PYTHON  ?= python3
VENV    ?= .venv
RUN_DIR ?= $(CURDIR)/run
BIN     := $(VENV)/bin
PYTEST_ARGS ?=
BENCH_ARGS  ?=

NATIVE := $(shell find ocssd_daemon -name '*.pyx' -o -name '*.pxd' -o -name '*.h')

.PHONY: help run test lint bench build dev deps clean
.DEFAULT_GOAL := help

help:
	@echo "make run    build, then serve a disk from RAM and print how to attach it"
	@echo "make test   lint and every test; as root on Debian/Ubuntu it installs the programs they need"
	@echo "make lint   ruff, mypy, cython-lint, import layers"
	@echo "make bench  speed beside other servers, as tables and JSON"
	@echo "make clean  remove what the above made"

# The interpreter, the daemon installed in it (editable), and what it needs.
$(VENV)/.runtime: pyproject.toml tools/make-venv
	@PYTHON="$(PYTHON)" tools/make-venv "$(VENV)"
	@touch $@

# The extensions again, after an edit: only those that the edit touches.
$(VENV)/.built: $(VENV)/.runtime $(NATIVE)
	@tools/build-native $(BIN)/python
	@touch $@

# What tests and lint need.
$(VENV)/.dev: $(VENV)/.runtime
	@PYTHON="$(PYTHON)" tools/make-venv "$(VENV)" test lint sim dask
	@touch $@

build: $(VENV)/.built
dev: $(VENV)/.built $(VENV)/.dev

# Programs from the distribution that tests run beside ours.
deps:
	@tools/install-test-deps

run: build
	@mkdir -p "$(RUN_DIR)"
	@$(BIN)/ocssd-daemon --socket "$(RUN_DIR)/vhost-user.sock" --nbd "unix:$(RUN_DIR)/nbd.sock" --show-attach $(RUN_ARGS)

lint: dev
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@PATH="$(BIN):$$PATH" cython-lint ocssd_daemon
	@$(BIN)/lint-imports --no-logo

test: dev deps lint
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: dev deps
	@$(BIN)/python -m bench $(BENCH_ARGS)

clean:
	rm -rf "$(VENV)" build run *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find ocssd_daemon \( -name '*.so' -o -name '*.c' \) -delete
