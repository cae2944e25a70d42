# Every target makes its own environment first: `make test` and `make demo` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# What users install next to this package, "torch>=2.4" as torch==2.4.*; numpy is torch's, the dev extra names its floor.
FLOORS = $(shell grep -oE '"(torch|numpy|lightly|hydra-core|omegaconf|matplotlib|rich|scikit-learn)>=[0-9.]+' \
	pyproject.toml | tr -d '"' | sort -u | sed 's/>=\(.*\)/==\1.*/')

# Where the files of this commit can be read, for example https://HOST/OWNER/mmi-loss/raw/v0.1.0: a package index shows
# pictures and follows links with an address only. Without one, `make dist` leaves them out of the index's page.
ADDRESS ?=

.PHONY: test test-oldest demo fuzz docs tutorials dist try-dist clean

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

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml
	@echo "open build/docs/index.html"

# Runs the notebooks and stores what they print, and draws the pictures.
tutorials: $(VENV)/installed
	$(BIN)/python docs/site/tutorials.py
	$(BIN)/python docs/site/pictures.py

# From the last commit, without what else lies in the folder.
dist: $(VENV)/installed
	rm -rf build/source dist && mkdir -p build/source
	git archive HEAD | tar -x -C build/source
ifeq ($(ADDRESS),)
	sed -E -i -e 's~^!\[[^]]*\]\([^:)]*\)$$~~' -e 's~\[([^]]*)\]\([^:)]*\)~\1~g' build/source/README.md
else
	sed -E -i 's~\]\(([^:)]*)\)~]($(ADDRESS)/\1)~g' build/source/README.md
endif
	$(BIN)/python -m build --outdir dist build/source
	$(BIN)/twine check --strict dist/*

# What a user does with the wheel: a clean environment, and the README's lines in it. It downloads torch, some 5 GB.
try-dist: dist
	rm -rf build/user && $(PYTHON) -m venv build/user
	build/user/bin/pip install --quiet dist/*.whl
	cd build && user/bin/python -I ../docs/site/try_readme.py
	rm -rf build/user

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
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
