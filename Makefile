# make help lists what can be asked for. PYTHON chooses the interpreter that .venv is made with.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
# One step after the other: pip must not write one .venv twice at a time.
.NOTPARALLEL:

.PHONY: help install demo paper base base-check test test-slurm lint bench clean

help:
	@echo "make install     installs into .venv and runs nothing; the others do that first, where they need it"
	@echo "make demo        data, training, merge and evaluation in the small; leaves runs/demo/report.html"
	@echo "make paper       every system of the paper as a row, three seeds, sweeps (hours); writes docs/results.md"
	@echo "make base        trains the tiny base of the package anew, from nothing (hours)"
	@echo "make base-check  the first steps of that, compared with how they went (15 minutes)"
	@echo "make test        format, lint, types and all tests that need no Slurm"
	@echo "make test-slurm  the batch scripts on a private Slurm of this machine (installs it when run as root)"
	@echo "make lint        format, lint and types only"
	@echo "make bench       ours beside the alternatives"
	@echo "make clean       removes .venv; runs/ stays"

install: .venv/installed

demo: .venv/installed
	$(BIN)/cogvlm-hpe demo

paper: .venv/installed
	$(BIN)/cogvlm-hpe paper --results docs/results.md

# One rank of one thread: what the packaged base was trained with. Interrupted ones go on.
TRAIN_BASE = OMP_NUM_THREADS=1 $(BIN)/cogvlm-hpe train --resume --config cogvlm_hpe/configs/tiny
base: .venv/installed runs/base/a-base/index.json runs/base/b-base/index.json
	$(TRAIN_BASE)/tower.yaml
	$(TRAIN_BASE)/whole.yaml
	$(TRAIN_BASE)/attributes.yaml
	$(BIN)/python -m cogvlm_hpe.model.tiny take runs/base

# The rate does not depend on the horizon while it rises, which it does for 40 steps.
base-check: .venv/installed runs/base/a-base/index.json runs/base/b-base/index.json
	rm -rf runs/base/check
	$(TRAIN_BASE)/tower.yaml --run_dir runs/base/check --train.max_steps 40
	$(BIN)/python -m cogvlm_hpe.model.tiny check runs/base/check

runs/base/a-base/index.json: | .venv/installed
	$(BIN)/hpe-launch shards build synthetic --domain A --split base --scenes 15000 --seed 1 --out $(@D)

runs/base/b-base/index.json: | .venv/installed
	$(BIN)/hpe-launch shards build synthetic --domain B --split base --scenes 9000 --seed 1 --out $(@D)

# Two at a time: the slow ones spend half of their time waiting for the processes they start. A file stays on one of the two: its cases share models.
# By name, as the long ones come first then; by their number of tests the longest would come last, beside nothing.
test: lint
	tests/install.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slurm"

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
