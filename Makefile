# Two commands to know: `make demo` and `make test`. Each makes .venv where there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo-out

.PHONY: demo test lint format docs benchmarks clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## phantom DICOM volume -> 23-view CT -> FBP, TV, prior -> DICOM and report
	$(BIN)/recon demo -o $(OUT) --overwrite

test: $(STAMP)  ## the whole suite
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## the documentation as a site in build/site; a warning is an error
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/site

benchmarks: $(STAMP)  ## docs/results.md, measured again; continues if it was cut short
	$(BIN)/recon benchmark all --quick -o docs/results --overwrite --page docs/results.md

clean:
	rm -rf $(VENV) build docs/api dist *.egg-info demo-out
