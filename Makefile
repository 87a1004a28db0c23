# Everything from a fresh clone with Python >= 3.10 and make: `make demo`, `make test`, `make lint`, `make format`.
# PYTHON chooses the interpreter that makes .venv.
PYTHON ?= python3
BIN := .venv/bin
# Test processes, of one thread each.
JOBS ?= 2

.PHONY: help demo test lint format clean
help:
	@echo "make demo    find similar photographs and rebuild masked ones with the embedded weights -> demo.png"
	@echo "make test    all tests that need no GPU; set PMAE_DATA to the folder of image archives for those on real data"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff format the code"
	@echo "make clean   delete .venv and caches"

demo: .venv/.demo
	$(BIN)/python training/demo.py --out demo.png

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache

# One environment; each target adds the extras it needs. A changed pyproject.toml installs anew.
.venv/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

.venv/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
