# make run    set up what is missing and serve on http://127.0.0.1:5000
# make model  fetch and quantise MODEL now, with progress (VERIFY=1: hash every file of it again)
# make estimate  what MODEL takes and whether it fits this machine, or a GPU of that many GB (GPU=24)
# make stack  redis-server, gunicorn and nginx with TLS together on this machine, without Docker
# make secrets  passwords and certificate for docker compose (DOMAIN=llm.example.org; TLS_CERT= and TLS_KEY= are yours)
# make audit-verify  whether the audit log is whole
# make rotate-key  a new key to encrypt and sign with
# make test   all tests (as root on Debian, installs g++, redis-server, nginx, postgresql, prometheus and chromium)
# make check  linters, types, and the configuration files
# make bench  the numbers in README, hours (PEERS=all for every peer, FRESH=1 to begin anew, ROWS="decode http" for some)
# make docs   docs/configuration.md from the settings, docs/promises.md from the tests' markers (make promises)
# make screenshots  pictures of the page in each state, into ./screenshots
# make clean  remove .venv and caches (DATA_DIR stays)
#
# Settings come from the environment and from .env (see .env.example). Another Python: make run PYTHON=python3.12
# PyTorch from a wheel, such as its CPU build: make run TORCH=/path/to/torch-….whl (docs/operations.md)

.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
DOMAIN ?= localhost
BIN := $(VENV)/bin
SHELL := bash
export PATH := $(PATH):/usr/sbin:/sbin
# Runs a command with .env, where there is one; what is already in the environment wins.
with_env = $(if $(wildcard .env),$(BIN)/dotenv run --no-override --)
fail = { echo "make: $(1)" >&2; exit 1; }

.PHONY: help run test check screenshots model estimate stack secrets docs promises audit-verify rotate-key bench clean services

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

run: $(VENV)/installed
	@$(with_env) $(BIN)/python -m model --serving
	@exec $(with_env) $(BIN)/gunicorn 'app:create_app()'

model: $(VENV)/installed
	@exec $(with_env) $(BIN)/python -m model $(if $(VERIFY),--verify)

estimate: $(VENV)/installed
	@exec $(with_env) $(BIN)/python -m model.weights.estimate $(GPU)

stack: model
	@exec $(with_env) $(BIN)/python -m ops.stack

bench: $(VENV)/installed
	@exec $(BIN)/python -m benchmarks $(if $(FRESH),--fresh) $(ROWS)

docs: promises
	@$(BIN)/python -m tests.configuration

promises: $(VENV)/installed
	@$(BIN)/python -m tests.promises

audit-verify: $(VENV)/installed
	@$(with_env) $(BIN)/flask --app app audit verify

rotate-key: $(VENV)/installed
	@$(with_env) $(BIN)/python -m crypto

# What is mounted has to be readable for the containers' users, after a umask of 077 and under SELinux too, where compose
# labels volumes but no secrets.
secrets:
	@TLS_CERT='$(TLS_CERT)' TLS_KEY='$(TLS_KEY)' ops/make-secrets secrets $(DOMAIN)
	@chmod -R a+rX nginx.conf ops
	@! selinuxenabled 2>/dev/null || chcon -R -t container_file_t secrets

# The demo model is made first: a slow machine may need longer for it than any single test is given.
test: $(VENV)/installed-dev services
	@MODEL=smollm2-135m-instruct DATA_DIR=data QUANTIZATION=nf4 $(BIN)/python -m model \
		|| echo "The demo model cannot be had here (the reason is above): its tests will be skipped, or fail in CI."
	$(BIN)/python -m pytest

screenshots: $(VENV)/installed-dev services model
	@exec $(BIN)/python -m tests.web.screenshots

check: $(VENV)/installed-dev services
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/docker-compose --profile monitoring config -q
	$(call with,nginx,$(BIN)/python -m ops.stack --check)
	$(call with,promtool,promtool check config ops/prometheus/prometheus.yml)

# Runs a check where its program is installed; in CI it has to be.
with = @if command -v $(1) >/dev/null || [ "$(CI)" = true ]; then $(2); else echo "Skipped, no $(1) here: $(2)"; fi

services:
	@ops/install-services

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

cpu_hint = No NVIDIA GPU here: PyTorch's CPU build would do, and saves 4 GB of disk (docs/operations.md, Disk).

# An installation that was interrupted is started afresh (.unfinished tells); pip's own cache makes that quick.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| $(call fail,Python 3.11 or newer is needed and $(PYTHON) is not; name another: make $(MAKECMDGOALS) PYTHON=python3.12)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| $(call fail,$(PYTHON) cannot make virtual environments; install its venv package (apt install python3-venv))
	@if [ -e $(VENV)/.unfinished ]; then rm -rf $(VENV); fi
	@{ mkdir -p $(VENV) && touch $(VENV)/.unfinished; } || $(call fail,cannot write to $(VENV))
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of $(1) into $(VENV), which takes minutes."
	@$(if $(TORCH)$(PIP_EXTRA_INDEX_URL)$(PIP_FIND_LINKS),,command -v nvidia-smi >/dev/null || echo "$(cpu_hint)")
	@$(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH),"$(TORCH)") -r $(1) \
		|| $(call fail,the packages could not be installed (the reason is above); run make again to go on)
	@rm $(VENV)/.unfinished
	@touch $@
endef

$(VENV)/installed: requirements.txt
	$(call install,$<)

$(VENV)/installed-dev: requirements-dev.txt requirements.txt
	$(call install,$<)
	@touch $(VENV)/installed
