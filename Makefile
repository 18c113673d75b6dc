# Each verb does its own set-up: a virtual environment, the dependencies, and redis-server when it can be had.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: demo up test test-all test-gpu lint bench tune bench-kernels setup clean

demo: setup
	$(BIN)/epd demo --questions 10 --multi

up: setup
	$(BIN)/epd serve

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not gpu and not slow"

test-all: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/epd bench

# these want a GPU, and the Python that sees it: make test-gpu PYTHON=python3
test-gpu:
	PYTHONPATH=.:pruning:kernels:services $(PYTHON) -m pytest -n auto -m gpu tests/kernels $(wildcard tests/epd/test_*gpu.py tests/epd/test_tower*.py tests/epd/test_quantize_[hv]*.py)

tune:
	PYTHONPATH=kernels $(PYTHON) kernels/bench/tune_gemm.py -o kernels/epd_kernels/tuned

bench-kernels:
	PYTHONPATH=kernels $(PYTHON) kernels/bench/bench_gemm.py -o docs/bench/gemm_h200.csv
	PYTHONPATH=kernels $(PYTHON) kernels/bench/bench_gemlite.py -o docs/bench/gemlite_h200.csv
	PYTHONPATH=kernels $(PYTHON) kernels/bench/bench_layer.py -o docs/bench/layer_h200.csv
	PYTHONPATH=kernels $(PYTHON) kernels/bench/bench_kv_attention.py -o docs/bench/kv_attention_h200.csv
	PYTHONPATH=kernels $(PYTHON) kernels/bench/bench_sampling.py -o docs/bench/sampling_h200.csv
	$(PYTHON) kernels/bench/report.py docs/bench/gemm_h200.csv --layers docs/bench/layer_h200.csv --page kernels/README.md --plot docs/bench/roofline_h200.png

setup: .venv/.ready
	@command -v redis-server >/dev/null || command -v valkey-server >/dev/null || sh docker/install-redis.sh

# torch goes first and by exact version, so that no dependency pulls a larger build
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv || { apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv .venv; }
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
