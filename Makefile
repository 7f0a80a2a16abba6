# the first of these that is there and can make environments; `make PYTHON=...` takes another
PYTHON ?= $(shell for v in 3.11 3.12 3.10; do \
	if python$$v -c 'import ensurepip, venv' >/dev/null 2>&1; then echo python$$v; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all test-lowest battery lint fidelity clean

# each stamp is remade when what it installs from changes
$(VENV)/pip:
	@test -n "$(PYTHON)" || { echo "make needs Python 3.11, 3.12 or 3.10 with venv, and none is on the PATH:" \
		"install one, or say make PYTHON=/path/to/python"; exit 1; }
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

# the fast tests
test: $(VENV)/test
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/test
	$(BIN)/python -m pytest

# the environments on the oldest libraries that pyproject.toml allows (torch is the pinned one)
test-lowest: $(VENV)/test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/lowest -r tests/lowest.txt
	PYTHONPATH=$(VENV)/lowest $(BIN)/python -m pytest tests/test_worlds.py tests/test_wrappers.py tests/test_latents.py \
		tests/test_dream_env.py tests/test_dream_env_limits.py tests/test_refusals.py tests/test_snapshots.py tests/envs/test_real_env.py -m "not slow"

# every test of reliability, whole: hours; figures into out/battery
battery: $(VENV)/test
	DREAMENV_BATTERY=full $(BIN)/python -m pytest tests/battery tests/agents/test_rounds.py --dist loadscope

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright
	$(BIN)/python .ci/functions.py dreamenv trainers envs agents examples

# measures CoinRun's embedded bundles anew, of easy and of hard mode, and writes the tables in docs/fidelity.md
fidelity: $(VENV)/demo
	$(BIN)/dreamenv compare --thorough --card
	$(BIN)/python -m dreamenv.evaluation.card docs/fidelity.md coinrun
	$(BIN)/dreamenv compare --card --distribution-mode hard --out out/compare-hard
	$(BIN)/python -m dreamenv.evaluation.card docs/fidelity.md coinrun --distribution-mode hard

clean:
	rm -rf $(VENV) out
