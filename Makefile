# make demo | make test | make sweep | make lint | make peers | make wheel: each does all its set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Two test processes on two cores: one thread each is faster than four threads in all.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadscope

.PHONY: demo test test-fast sweep lint peers wheel clean

demo: $(VENV)/.installed-all
	OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.demo

test: $(VENV)/.installed-test
	$(PYTEST) --durations 15
	$(BIN)/python -m pytest --quiet --doctest-modules ptqc/spec.py ptqc/act_spec.py ptqc/select.py

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m "not slow and not sweep"

# Every case of the sweeps: kernels of all specs, types and epilogues, and files damaged ten thousand times. Hours.
sweep: $(VENV)/.installed-test
	$(PYTEST) -m sweep

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests against llama.cpp: its package is built from source, which takes minutes.
peers: $(VENV)/.installed-peers
	$(PYTEST) tests/export

wheel: $(VENV)/.installed-lint
	rm -rf dist build
	$(BIN)/python -m build --quiet .

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/pip
	$(PIP) torch
	$(PIP) --editable ".[$*]"
	touch $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
$(VENV)/.installed-peers: $(VENV)/.installed-test

$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --upgrade "pip>=25"
	touch $@

clean:
	rm -rf $(VENV) build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis
