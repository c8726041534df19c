# Everything needs Python and make only: the first target that runs sets up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test test-all test-fast test-extras test-oldest demo docs style quality clean

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,test,quality]"
	touch $@

# A worker a core; the files of tests that take long are started first.
WORKERS := -n auto --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests $(WORKERS)

# With every case of the tests of which `make test` draws some.
test-all: $(VENV)/.installed
	$(BIN)/python -m pytest tests $(WORKERS) --all-cases

test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest tests $(WORKERS) -m "not slow and not hub"

# What needs libraries that are used if they are there.
test-extras: $(VENV)/.installed .venv-space/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[extras,lm-eval,quantised,search]"
	$(BIN)/python -m pytest tests -m extras
	.venv-space/bin/python -m pytest tests/test_space.py

# Gradio takes no Pillow of today, so that it has an environment of its own.
.venv-space/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv-space
	sed '/^pillow==/d' constraints.txt > .venv-space/constraints.txt
	.venv-space/bin/pip install --quiet --constraint .venv-space/constraints.txt --editable ".[test,space]"
	touch $@

# With the lower bounds of setup.py, in an environment of their own.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest tests $(WORKERS)

.venv-oldest/.installed: setup.py
	$(PYTHON) -m venv .venv-oldest
	sed -nE 's/^ {8}"([A-Za-z_]+)>=([0-9.]+)",$$/\1==\2/p' setup.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --constraint .venv-oldest/constraints.txt --editable ".[demo,test]"
	touch $@

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/hf-esm demo --output demo_output

# The site in site/. Fails on a broken link, a public name without a docstring, or a message that is not raised any more.
docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m pytest tests/test_documents.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Lint, format, spelling, types of what users call. The staircase of the wings is tests/test_house.py.
quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/ty check --python $(VENV)
	$(BIN)/python -m pytest tests/test_house.py

clean:
	rm -rf $(VENV) .venv-oldest .venv-space demo_output site
