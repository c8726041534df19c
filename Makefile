# Everything needs Python and make only: the first target that runs sets up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test demo style quality clean

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,test,quality]"
	touch $@

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests -n auto --dist loadfile

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/hf-esm demo --output demo_output

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
	rm -rf $(VENV) demo_output
