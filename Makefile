# `make demo` and `make test` work from a fresh clone; see README.md.
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 1
# Two at a time; the tests of a file share trainings, so they stay together. In the order of the
# folders, which begins with the long ones.
PYTEST := $(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: demo test test-fast lint setup kernel-report replicate clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, prepare real text, train a small UAR model, write figures"
	@echo "make test       set up, check style and types, run all tests"
	@echo "make test-fast  the tests that take seconds"
	@echo "make lint       style, types, layering"
	@echo "make replicate  the paper's Tables 2 and 3 at demo scale, about an hour; call it again to go on"
	@echo "make kernel-report  what the kernels cost, computed without a GPU: kernels/REPORT.md"

setup:
	@scripts/setup.sh

demo: setup
	@$(PY) scripts/demo.py

test: lint
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not slow"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/shellcheck launch/* scripts/*.sh

kernel-report: setup
	$(PY) scripts/kernel_report.py

replicate: setup
	@$(PY) scripts/replicate.py

clean:
	rm -rf .venv runs data/demo dist build *.egg-info
