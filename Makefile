# `make demo` and `make test` work on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes: a test takes one core. The tests of a file share what it makes, so they stay together.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test docs check clean

demo: $(VENV)/.demo
	@mkdir -p build
	$(BIN)/pnc demo --report build/demo-report.html

test: $(VENV)/.test
	$(PYTEST)

docs: $(VENV)/.test
	$(BIN)/python -m sphinx -q -n -W --keep-going -c docs -d build/doctrees . build/site
	@echo "build/site/index.html"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: an exact version, so that no later requirement can choose a bigger build of it.
$(VENV)/.torch: $(BIN)/python constraints.txt
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[digits,report]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
