# make help lists what can be asked for. PYTHON chooses the interpreter that .venv is made with.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
# One step after the other: pip must not write one .venv twice at a time.
.NOTPARALLEL:

.PHONY: help demo test test-slurm lint bench clean

help:
	@echo "make demo        data, training, merge and evaluation in the small; leaves runs/demo/report.html"
	@echo "make test        format, lint, types and all tests that need no Slurm"
	@echo "make test-slurm  the batch scripts on a private Slurm of this machine (installs it when run as root)"
	@echo "make lint        format, lint and types only"
	@echo "make bench       ours beside the alternatives"
	@echo "make clean       removes .venv; runs/ stays"

demo: .venv/installed
	$(BIN)/cogvlm-hpe demo

# Two at a time: the slow ones spend half of their time waiting for the processes they start. A file stays on one of the two: its cases share models.
test: lint
	tests/install.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slurm"

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slurm: .venv/installed-test
	tests/slurm/install.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/slurm

bench: .venv/installed-bench
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv

# The stamps: nothing is installed, and no network is used, until setup.cfg or constraints.txt change.
.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON): Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "== .venv from $$($(PYTHON) --version)"
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed: .venv/python setup.cfg constraints.txt
	@echo "== torch (the largest download)"
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@echo "== everything else"
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e .
	touch $@

# SwissArmyTransformer and sixdrepnet alone: what they require (boto3, datasets, torchvision, …) contradicts our versions,
# and what is compared with needs none of it.
.venv/installed-test: .venv/installed
	@echo "== what 'test' needs besides"
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt --no-deps SwissArmyTransformer sixdrepnet
	touch $@

.venv/installed-%: .venv/installed
	@echo "== what '$*' needs besides"
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e ".[$*]"
	touch $@
