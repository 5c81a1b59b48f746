# Every target makes its own environment first: the machine needs Python >= 3.11, make and git, nothing else.
#   make test PYTHON=python3.12 VENV=/tmp/venv      another interpreter, another place for the environment

PYTHON ?= python3
VENV ?= .venv
THREADS ?= 2
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Installed without what it asks for, which the lock holds but for pycosat: a C extension without wheels, used by one kind
# of puzzle that is not among our tasks.
REASONING_GYM = reasoning_gym==0.1.25
TORCHAO = torchao==0.18.0

# Nothing here may fetch models or datasets: a test that tries fails at once instead of waiting for a network.
export HF_HUB_OFFLINE = 1

.PHONY: help quickstart venv test test-slow test-fp8 lint bench clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

# More threads would only wait for each other: the models are tiny.
quickstart: venv  ## the whole path on bundled tiny models, from problems to evaluated students and their report
	OMP_NUM_THREADS=$(THREADS) $(BIN)/distill run recipes/quickstart.yaml $(ARGS)

test: venv  ## run the tests, without those marked slow
	$(BIN)/python -m pytest

test-slow: venv  ## run the heavy tests only
	$(BIN)/python -m pytest -m slow

# An environment of its own: wherever torchao is installed, transformers and PEFT import it, and on a machine without a
# GPU it then complains of its kernels on every terminal.
test-fp8:  ## run the tests of FP8 training, which need torchao
	$(MAKE) venv VENV=$(VENV)-fp8
	$(VENV)-fp8/bin/python -m pip install --quiet --disable-pip-version-check $(TORCHAO)
	$(VENV)-fp8/bin/python -m pytest -m "slow or not slow" tests/modeling_deepseek/test_fp8_training.py

lint: venv  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv  ## measure against transformers' own and lm-eval, print the table
	PYTHONPATH=. $(BIN)/python tests/benchmarks/run.py $(ROWS)

clean:  ## remove the environment and what the tools leave behind
	rm -rf $(VENV) $(VENV)-fp8 build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(STAMP)

# Installs again when the lock or the project file changes; otherwise costs nothing.
# No build isolation: the lock already holds setuptools, so nothing is fetched to install the project itself.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python >= 3.11 is needed, and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.11")'
	@echo "installing requirements.lock into $(VENV) (a minute or more the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(REASONING_GYM)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
