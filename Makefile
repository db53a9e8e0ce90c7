# Set-up and commands. Needs Python 3.10 or newer (with venv) and make; everything else goes into $(VENV).
#
#   make demo                          the main experiment, on emulated devices
#   make test PYTHON=python3.12        another interpreter
#   make demo PIP_ARGS="..."           extra arguments for pip, for example another torch build
#   make test TEST_JOBS=0              tests one after the other, in this terminal
#   make test-machine-code TRITON=3.8.0   what another Triton makes of D2's kernels

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
TEST_JOBS ?= 2
# The one that torch 2.11 comes with on CUDA.
TRITON ?= 3.6.0

python := $(VENV)/bin/python
# A file's tests share reference runs. In order of name, the long files do not come last.
in_parallel := -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder
pip_install := PIP_DISABLE_PIP_VERSION_CHECK=1 $(python) -m pip install --quiet $(PIP_ARGS) -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-dev install-workloads demo lint test test-all test-gpu test-machine-code keep-reports clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

install: $(VENV)/.installed  ## create .venv with the package and what the recipes need

install-dev: $(VENV)/.installed-dev  ## the same plus what tests and checks need

install-workloads: $(VENV)/.installed-workloads  ## models and data of the eight workloads, without another torch

demo: $(VENV)/.installed  ## train across 4 -> 2 -> 1+2 devices and compare with stock DDP (outputs/demo)
	$(python) -m recipes.accuracy_consistency hydra.run.dir=outputs/demo $(DEMO_ARGS)
	@echo "Figure: outputs/demo/fig9.png   Report: outputs/demo/report.json"

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

test: lint  ## checks and tests that fit in 20 minutes on 2 cores
	$(python) -m pytest -m "not matrix and not gpu" $(in_parallel) $(PYTEST_ARGS)

test-all: lint  ## the same with the full product of cases; report in outputs/test-all
	@mkdir -p outputs/test-all
	$(python) -m pytest -m "not gpu" $(in_parallel) --junit-xml=outputs/test-all/junit.xml $(PYTEST_ARGS); ended=$$?; \
	  $(python) -m tests.report outputs/test-all/junit.xml --report outputs/test-all/report.md && exit $$ended

test-gpu: $(VENV)/.installed-dev  ## tests that need a CUDA device; report in outputs/test-gpu
	@mkdir -p outputs/test-gpu
	$(python) -m pytest -m gpu --junit-xml=outputs/test-gpu/junit.xml $(PYTEST_ARGS)

test-machine-code: $(VENV)/.installed-dev  ## what D2's GPU kernels are compiled to, without a GPU; installs Triton
	$(pip_install) triton==$(TRITON)
	$(python) -m pytest $(in_parallel) $(PYTEST_ARGS) \
	  $(addprefix tests/kernels/test_,interpreted.py launch.py ptx.py sass.py tiles.py winograd.py)

keep-reports: $(VENV)/.installed-dev  ## write recipes/results and README from the last test-all and test-gpu
	$(python) -m tests.report $(wildcard outputs/test-all/*.xml outputs/test-gpu/*.xml) \
	  --report recipes/results/test_report.md --faults recipes/results/faults.md \
	  --features recipes/results/features.md --readme README.md

clean:  ## remove .venv, caches and build leftovers; outputs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.10. HINT: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot create virtual environments. HINT: install its venv module" \
	    "(Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(pip_install) -e ".[recipes]"
	@touch $@

$(VENV)/.installed-workloads: $(VENV)/.created pyproject.toml constraints.txt requirements-workloads.txt
	$(pip_install) -e ".[recipes,workloads]"
	$(pip_install) --no-deps -r requirements-workloads.txt
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.installed-workloads
	$(pip_install) -e ".[dev]"
	@touch $@
