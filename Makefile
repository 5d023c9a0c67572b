# Targets create the environment .venv if it does not exist; set VENV or PYTHON to use others. The constraints file pins
# torch, so that nothing replaces the CPU build. torch-fidelity is installed without torchvision in a separate folder,
# for the tests of the extractor `inception`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-$(shell cksum pyproject.toml constraints-cpu.txt | cksum | cut -d' ' -f1)
DOCS_STAMP := $(STAMP)-docs

# Options for pytest-cov, which .ci/run sets.
COVERAGE ?=

export HF_HUB_OFFLINE ?= 1
# Tests start many processes, which would all compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-all check bench docs clean help
help:
	@echo "make demo       train a teacher on the digits, distil it to 8, 4, 2 and 1 steps, write runs/digits/report/index.html"
	@echo "make test       run the fast tests (CPU, no network), in about 6 minutes on two cores"
	@echo "make test-slow  run the slow tests: tests/slow_tests.txt, larger scales, compilers, launchers"
	@echo "make test-all   run both in one session, which shares their runs, in about 20 minutes"
	@echo "make check      run ruff, mypy and import-linter"
	@echo "make bench      run the short benchmarks: updates, sampling, memory, checkpoints, two processes"
	@echo "make docs       build the documentation into site/ and check its links"
	@echo "make clean      remove .venv and caches, but not runs/"

$(STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "halfstep needs Python 3.11 to 3.13, but $(PYTHON) is %d.%d: make PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt torch
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt -e . --group dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/torch-fidelity torch-fidelity==0.4.0
	rm -f $(VENV)/.installed-*
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt --group docs
	touch $@

demo: $(STAMP)
	$(BIN)/halfstep demo

test: SELECTED := -m "not slow"
test-slow: SELECTED := -m slow
test-all: SELECTED :=
test test-slow test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(SELECTED) $(COVERAGE)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	for name in step sample memory io scale; do $(BIN)/python benchmarks/$$name.py --short || exit 1; done

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "wrote site/index.html"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage htmlcov build dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
