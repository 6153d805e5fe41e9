# `make demo` and `make test` work from a fresh clone; see README.md.
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-fast lint setup kernel-report clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, prepare real text, train a small UAR model, write figures"
	@echo "make test       set up, check style and types, run all tests"
	@echo "make test-fast  the tests that take seconds"
	@echo "make lint       style, types, layering"
	@echo "make kernel-report  what the kernels cost, computed without a GPU: kernels/REPORT.md"

setup:
	@scripts/setup.sh

demo: setup
	@$(PY) scripts/demo.py

test: lint
	$(PY) -m pytest

test-fast: setup
	$(PY) -m pytest -m "not slow"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

kernel-report: setup
	$(PY) scripts/kernel_report.py

clean:
	rm -rf .venv runs data/demo dist build *.egg-info
