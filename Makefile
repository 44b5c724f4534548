# `make demo` and `make test` do everything on a fresh machine: both fill the virtual environment first, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Everything here runs offline; without this, a machine that reaches no hub waits for it.
export HF_HUB_OFFLINE := 1

# Named, so that accelerate prints no list of the defaults it chose. `--cpu` also makes it use more than one thread.
LAUNCH = $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	$(shell nvidia-smi -L >/dev/null 2>&1 || echo --cpu --num_cpu_threads_per_process $$(getconf _NPROCESSORS_ONLN))

.PHONY: help install demo test test-slow test-gpu bench bench-gpu bench-demo bench-quality bench-reliability docs numbers lint clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

install: $(INSTALLED)  ## fill the virtual environment .venv (VENV=... for another)

# The stamp is written last: an interrupted install starts again.
$(INSTALLED): setup.cfg pyproject.toml scripts/install.sh
	@scripts/install.sh $(VENV) $(PYTHON)
	@touch $@

# One GPU: with more in sight, Trainer in one process would split each batch over them (DataParallel).
demo: export CUDA_VISIBLE_DEVICES ?= 0
demo: $(INSTALLED)  ## train a small SFT model, then improve it with SPIN
	$(BIN)/python recipes/pronunciation_sft.py
	$(LAUNCH) recipes/spin.py --config recipes/pronunciation.yaml

# Two tests at a time, since many wait for a process. conftest.py says which stay together. WORKERS=0: one at a time.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

test: $(INSTALLED)  ## run the tests; pytest's own arguments in ARGS="..."
	$(PYTEST) $(ARGS)

test-slow: $(INSTALLED)  ## run the slow tests too
	$(PYTEST) -m "not gpu" $(ARGS)

test-gpu: $(INSTALLED)  ## run the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: $(INSTALLED)  ## speed and memory, each next to what one would use instead; only some: ARGS="generation scale"
	$(BIN)/python benchmarks/suite.py $(ARGS)

bench-gpu: $(INSTALLED)  ## speed and memory on an NVIDIA GPU
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-demo: $(INSTALLED)  ## the demo over three seeds, next to further SFT
	$(BIN)/python benchmarks/pronunciation.py $(ARGS)

bench-quality: $(INSTALLED)  ## the self-play family compared on four tasks, with equal budgets: 75 minutes
	$(BIN)/python benchmarks/quality.py $(ARGS)

bench-reliability: $(INSTALLED)  ## kills survived, faults injected, seconds until all processes have ended
	$(BIN)/python benchmarks/reliability.py $(ARGS)

docs: $(INSTALLED)  ## write the tables of docs/configuration.md from the docstrings
	$(BIN)/python scripts/document_fields.py

numbers: $(INSTALLED)  ## how large and how tangled the code is, beside its limits
	@$(BIN)/python scripts/code_numbers.py

lint: $(INSTALLED)  ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

clean:  ## remove build output and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find benchmarks recipes scripts spin_trl tests -name __pycache__ -exec rm -rf {} +
