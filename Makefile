# `make run` and `make test` set up what they need in .venv; nothing is installed by hand, and neither installs torch.
PYTHON ?= python3
PORT ?= 8080
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help run test check demo bench-gateway test-encoders clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /	/' | expand -t 16

$(VENV)/serve: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) …"
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/dev: $(VENV)/serve
	$(PIP) install --constraint constraints.txt --editable '.[train]' --group dev
	@touch $@

run: $(VENV)/serve  ## serve on http://127.0.0.1:8080 (PORT=…), with the shipped bundle and an echo target
	$(BIN)/router serve --port $(PORT)

test: $(VENV)/dev  ## the fast tests
	$(BIN)/python -m pytest

check: $(VENV)/dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
