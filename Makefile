PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint fidelity clean

# each stamp is remade when what it installs from changes
$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo: $(VENV)/pip pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e '.[procgen,play]'
	touch $@

$(VENV)/test: $(VENV)/demo
	$(PIP) -e '.[all,dev]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/dreamenv demo --out out/demo

test: $(VENV)/test
	$(BIN)/python -m pytest

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

# measures the embedded bundle anew and writes the README's table
fidelity: $(VENV)/demo
	$(BIN)/dreamenv compare --thorough --card
	$(BIN)/python -m dreamenv.evaluation.card README.md

clean:
	rm -rf $(VENV) out
