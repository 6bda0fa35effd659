# Two commands do everything on a bare machine with Python 3.11 or newer: `make quickstart` and `make test`.
# Both create .venv and install what they need into it; neither needs root or a GPU.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-all lint bench debian clean

quickstart: $(VENV)/.quickstart
	@echo "== Training a small backbone on photos that came with the packages (a few minutes) =="
	$(BIN)/opsin quickstart

test: $(VENV)/.dev
	@echo "== Running the tests (a few minutes; slow ones are in make test-all) =="
	$(BIN)/pytest -n 2 -m "not slow"

test-all: test
	@echo "== Running the slow tests =="
	$(BIN)/pytest -n 2 -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	mkdir -p runs/benchmarks
	$(BIN)/opsin bench step --out runs/benchmarks/bench-step.json
	$(BIN)/opsin bench input --out runs/benchmarks/bench-input.json
	$(BIN)/opsin bench features --out runs/benchmarks/bench-features.json
	$(BIN)/python benchmarks/input.py
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/curation.py
	$(BIN)/python benchmarks/probes_knn.py
	$(BIN)/python benchmarks/probes_linear.py
	$(BIN)/python benchmarks/corruptions.py

# Real files for some tests, which skip themselves without: stereo, clips, VOC's masks. For Debian and what comes of it.
debian: .debian/.done

.debian/.done:
	rm -rf .debian
	mkdir -p .debian
	cd .debian && apt-get -o Acquire::Retries=3 download python3-skimage labelme-examples opencv-doc
	cd .debian && for package in *.deb; do dpkg-deb -x $$package . || exit 1; done
	rm .debian/*.deb
	@touch $@

clean:
	rm -rf $(VENV) .debian .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@echo "== Creating $(VENV) =="
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Opsin needs Python 3.11 or newer, and $(PYTHON) is older: give another with PYTHON=python3.12 make ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: $(VENV)/bin/python pyproject.toml
	@echo "== Installing opsin into $(VENV): torch is large, the first time takes some minutes =="
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[quickstart]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	@echo "== Installing opsin with its tests into $(VENV): torch is large, the first time takes some minutes =="
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.quickstart
