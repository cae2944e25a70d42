# Every target makes its own environment first: `make test` and `make demo` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# What users install next to this package, "torch>=2.4" as torch==2.4.*; numpy is torch's, the dev extra names its floor.
FLOORS = $(shell grep -oE '"(torch|numpy|lightly|hydra-core|omegaconf|matplotlib|rich|scikit-learn)>=[0-9.]+' \
	pyproject.toml | tr -d '"' | sort -u | sed 's/>=\(.*\)/==\1.*/')

.PHONY: test test-oldest demo fuzz clean

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --cov --cov-report=term $(ARGS)  # a core each

# Not part of `make test`: a second torch, of some 5 GB with its CUDA libraries.
test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest --numprocesses 2 --dist loadfile $(ARGS)

demo: $(VENV)/installed
	$(BIN)/python -m benchmarks demo $(ARGS)

fuzz: $(VENV)/installed
	$(BIN)/python -m tests.fuzz $(ARGS)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

$(OLDEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --upgrade pip
	$(OLDEST)/bin/pip install --quiet --editable '.[dev]' $(foreach floor,$(FLOORS),'$(floor)')
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
