# Everything from a fresh clone with Python >= 3.10 and make: `make demo`, `make test`, `make lint`, `make format`.
# PYTHON chooses the interpreter that makes .venv.
PYTHON ?= python3
BIN := .venv/bin
# Test processes, of one thread each.
JOBS ?= 2
# What `make test-downstream` gives pytest.
DOWNSTREAM ?= tests/downstream
# The encoders that `make test-timm` tests; base, large and huge take tens of GiB.
TIMM_MODELS ?= vit_pico_patch8_pmae vit_tiny_patch16_pmae
OLDEST_TIMM := $(shell sed -n 's/^ *"timm>=\([0-9.]*\)",$$/\1/p' pyproject.toml)

.PHONY: help demo test lint format clean docs test-browser test-downstream test-timm
help:
	@echo "make demo    find similar photographs and rebuild masked ones with the embedded weights -> demo.png"
	@echo "make test    all tests that need no GPU; set PMAE_DATA to the folder of image archives for those on real data"
	@echo "make test-downstream  our encoders in transformers, smp, torchvision, scikit-learn, PEFT, ONNX: the real libraries"
	@echo "make test-browser     the page of pmae serve in a headless Chromium, which must be installed"
	@echo "make test-timm        timm's own model tests on our encoders, on the oldest and the newest timm"
	@echo "make docs    the documentation as a site, in site/"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff format the code"
	@echo "make clean   delete .venv and caches"

demo: .venv/.demo
	$(BIN)/python training/demo.py --out demo.png

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-downstream: .venv/.downstream
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(DOWNSTREAM)

# gradio takes Pillow back below 13 in .venv.
test-browser: .venv/.browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_serve.py

# Another timm before the installed one on the path, a few megabytes, rather than another environment with torch.
test-timm: .venv/.dev
	rm -rf .venv/timm
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/timm/oldest timm==$(OLDEST_TIMM)
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/timm/newest timm
	for version in oldest newest; do \
		export OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.venv/timm/$$version; \
		$(BIN)/python tests/timm_suite.py $(TIMM_MODELS) || exit 1; \
		$(BIN)/python -m pytest tests/downstream/test_plain_timm.py || exit 1; \
	done

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

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
EXTRAS_demo := picture
EXTRAS_dev := dev
EXTRAS_downstream := dev,downstream
EXTRAS_browser := dev,browser
EXTRAS_docs := docs
.venv/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS_$*)]"
	touch $@
