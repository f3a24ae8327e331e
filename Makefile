# Every target sets up what it needs; `make demo` and `make test` work on a fresh clone.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# those of `make install`, from then on
CONSTRAINTS ?= $(or $(file <$(VENV)/.constraints),constraints/cpu.txt)
DATA ?= shapes
PY312 ?= $(HOME)/.cache/tapir/py312
PYTHON312 ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python3; do \
	$$python -c "" 2>/dev/null && echo $$python && break; done)
# tests mostly wait for processes; those of a file share worlds and stay together
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) + 1)')
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
DOCS_STAMP := $(VENV)/.installed-docs

# program or file:package
SYSTEM := npm:npm ip:iproute2 /usr/share/wordnet/data.noun:wordnet-base \
	chromium:chromium /usr/sbin/slurmctld:slurm-wlm /usr/sbin/munged:munge cc:gcc

# tests start hundreds of processes, which would each compile what they import
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install system demo weights docs test test-slow test-fast check faults faults-torch soak matrix mutants slurm \
	bench gpu wheels py312 clean

install: $(STAMP)

$(STAMP): requirements.txt $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt -c $(CONSTRAINTS)
	$(BIN)/pip install --quiet --no-deps -e .
	echo $(CONSTRAINTS) > $(VENV)/.constraints
	touch $@

$(DEV_STAMP): $(STAMP) requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt -c $(CONSTRAINTS)
	$(BIN)/pip install --quiet --no-deps DALL-E taming-transformers-rom1504 trackio -c $(CONSTRAINTS)
	touch $@

# System packages: installed when we may (root with apt), else named; tests that need them then skip.
system:
	@for pair in $(SYSTEM); do \
		program=$${pair%%:*}; package=$${pair##*:}; \
		{ command -v $$program >/dev/null || [ -e $$program ]; } && continue; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y $$package; \
		else echo "missing: apt install $$package"; fi; \
	done

demo: $(STAMP) $(if $(filter emoji,$(DATA)),system)
	$(BIN)/tapir demo --data $(DATA) $(if $(OUT),--out $(OUT)) $(if $(MESH),--mesh $(MESH)) \
		$(if $(MINUTES),--minutes $(MINUTES))

# The models that come with Tapir, again, with their cards: SETS="shapes emoji" SEEDS="0 1 2" STEPS=1.
weights: $(STAMP) system
	$(BIN)/python -P -m workflow.weights $(SETS) $(if $(SEEDS),--seeds $(SEEDS)) \
		$(if $(STEPS),--steps $(STEPS))

test: $(DEV_STAMP) system
	$(PYTEST)

test-slow: $(DEV_STAMP) $(DOCS_STAMP) system
	$(PYTEST) -m "slow and not big"

test-fast: $(DEV_STAMP)
	$(PYTEST) -m "not world and not seconds and not slow and not big"

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.house
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# The site of docs/ in .site, which works without a network: open .site/index.html.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(DOCS_STAMP): $(STAMP) requirements-docs.txt
	$(BIN)/pip install --quiet -r requirements-docs.txt -c $(CONSTRAINTS)
	touch $@

faults: $(DEV_STAMP)
	TAPIR_OUTAGE=20 TAPIR_FORGIVEN=20 $(BIN)/python -m pytest tests/faults -m "not big"

faults-torch: $(DEV_STAMP)
	TAPIR_FAULTS_ENGINE=torch $(BIN)/python -m pytest tests/faults/test_survival.py \
		tests/faults/test_kill_and_resume.py tests/faults/test_soak.py -m "not big"

soak: $(DEV_STAMP)
	TAPIR_SOAK_KILLS=$${KILLS:-30} $(BIN)/python -m pytest tests/faults/test_soak.py -m "not big"
	TAPIR_ENDINGS=$${ENDINGS:-20} $(BIN)/python -m pytest tests/faults/test_endings.py -m "not big"
	TAPIR_LOST_RANKS=all $(BIN)/python -m pytest tests/faults/test_lost_ranks.py -m "not big"

matrix: $(DEV_STAMP)
	TAPIR_MATRIX=all $(BIN)/python -m pytest tests/multiprocess/training/test_checkpoint_matrix.py -m "not big"
	$(BIN)/python -m pytest tests/multiprocess/training/test_paper_block.py -m big

bench: $(DEV_STAMP) system
	$(BIN)/python -m bench engines --json
	$(BIN)/python -m bench parity --json
	$(BIN)/python -m bench network --json
	$(BIN)/python -m bench bubble --json
	$(BIN)/python -m bench saving --json
	$(BIN)/python -m bench goodput --json
	$(BIN)/python -m bench order --json
	$(BIN)/python -m bench attention --json
	$(BIN)/python -m bench orthogonal --json
	$(BIN)/python -m bench train_step --json
	$(BIN)/python -m bench dvae --json
	$(BIN)/python -m bench bpe --json
	$(BIN)/python -m bench sampling --json
	$(BIN)/python -m bench serving --json
	$(BIN)/python -m bench serve_load --json
	$(BIN)/python -m bench profile --json
	$(BIN)/python -m bench plan --json
	$(BIN)/python -m bench loader --json
	$(BIN)/python -m bench stream --json
	$(BIN)/python -m bench token_finish --json
	$(BIN)/python -m bench mixture --json
	$(BIN)/python -m bench pack --json
	$(BIN)/python -m bench dedup --json
	$(BIN)/python -m bench pictures --json
	$(BIN)/python -m bench start_up --json

# All that one GPU proves, in 8 minutes; a dry run: make gpu DEVICE=cpu TINY=1. Without make:
# python3 tests/gpu/run.py. Where there is no .venv it installs nothing but the wheels of .whl.
gpu: $(if $(wildcard $(BIN)/python),$(DEV_STAMP))
	$(PYTHON) -P tests/gpu/run.py $(if $(DEVICE),--device $(DEVICE)) $(if $(TINY),--tiny)

# What a GPU machine without a network lacks, in .whl; needs a package index.
wheels:
	$(PYTHON) -P tests/gpu/wheels.py lay

# Python 3.12 and a CUDA build of torch, as on that machine: 6 GB, kept outside the tree.
py312: wheels $(PY312)/.installed
	$(PY312)/bin/python -P tests/gpu/wheels.py install $(PY312)/site
	PYTHONPATH=$(CURDIR):$(PY312)/site $(PY312)/bin/python -P -m pytest tests/cuda_build tests/unit -m "not big"

# What comes as a wheel must not be in the venv: pip brings some of it as needs of others.
$(PY312)/.installed: tests/gpu/machine.txt tests/gpu/wheels.txt constraints/gpu.txt
	@[ -n "$(PYTHON312)" ] || { echo "no Python 3.12: make py312 PYTHON312=PATH"; exit 2; }
	$(PYTHON312) -m venv --clear $(PY312)
	$(PY312)/bin/pip install --quiet -r tests/gpu/machine.txt -c constraints/gpu.txt
	$(PY312)/bin/pip uninstall --quiet --yes -r tests/gpu/wheels.txt 2>/dev/null
	touch $@

clean:
	rm -rf $(VENV) runs .site .pytest_cache .mypy_cache .ruff_cache *.egg-info

slurm: $(DEV_STAMP) system
	$(BIN)/python -m pytest tests/slurm -m "big or not big"

# Break one place of the mathematics at a time: does a test notice? Verdicts stay in
# ~/.cache/tapir/mutants, so that it goes on where it ended. SAMPLE=200 SEED=1, PATCH=file.diff.
mutants: $(DEV_STAMP)
	$(BIN)/python -m tests.mutants $(if $(SAMPLE),--sample $(SAMPLE) --seed $(or $(SEED),0)) \
		$(if $(PATCH),--patch $(PATCH)) $(if $(ONLY),--only $(ONLY))
