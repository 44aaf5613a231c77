# Two commands for a fresh clone: `make demo` and `make test`. They need Python and pip alone.
PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/pip install -qq --disable-pip-version-check --constraint constraints.txt
READY  := $(VENV)/.ready
# One thread a worker: kernels that compete for cores make the suite slower, not faster.
ENV    := OMP_NUM_THREADS=1 PYTHONPATH=.
WORKERS ?= 2
# What runs the edge targets, without what it asks for and they do not use, such as a torch.
EDGE   := .edge
EDGE_WHEELS := executorch torchao litert-torch litert-converter ai-edge-litert ai-edge-quantizer \
    jax jaxlib ncnn pnnx coremltools \
    absl-py attrs cattrs immutabledict opt_einsum pyaml ruamel.yaml tabulate
# A property of the quick suite has all of its examples in the slow one.
SLOW   := '(slow or hypothesis) and not sweep and not edge and not rtx'
RTX    := .rtx
RTX_WHEELS := tensorrt-rtx-cu13-bindings==1.7.1.116 tensorrt-rtx-cu13-libs==1.7.1.116

.PHONY: demo test test-sweep test-edge test-rtx quick slow mutate fuzz fuzz-ci lint format clean

demo: $(READY)
	$(ENV) $(VENV)/bin/python examples/demo.py

test: $(READY)
	$(VENV)/bin/ruff check .
	$(ENV) $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal
	$(ENV) $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m $(SLOW)

# 1.1 GB in a folder of its own, beside which the environment stays as it is.
$(EDGE)/.ready: $(READY) constraints.txt
	rm -rf $(EDGE)
	$(PIP) --no-deps --only-binary :all: --target $(EDGE) $(EDGE_WHEELS)
	@touch $@

test-edge: $(EDGE)/.ready
	$(ENV):$(EDGE) $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m edge tests/backends/edge

# NVIDIA's TensorRT-RTX parses and builds without a GPU. Its wheels are for development and testing;
# they go to a folder of their own, and where there are none for this machine nothing is tested.
test-rtx: $(READY)
	@if test -e $(RTX)/.ready || ( \
	    $(PIP) --retries 1 --timeout 20 --no-deps --only-binary :all: --target $(RTX) $(RTX_WHEELS) \
	    && touch $(RTX)/.ready ); then \
	  $(ENV):$(RTX) $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m rtx tests/rtx; \
	else echo "test-rtx: SKIPPED: no TensorRT-RTX wheels can be installed here"; fi

test-sweep: $(READY)
	$(ENV) $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m sweep

quick: $(READY)
	$(ENV) $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

slow: $(READY)
	$(ENV) $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m $(SLOW)

# Breaks the rules in one place at a time: docs/trust.md. All takes hours; `make mutate SAMPLE=400`
# is an estimate, SEED draws others, ONLY=refold/algebra looks at one room.
SAMPLE ?= 0
SEED ?= 0
mutate: $(READY)
	$(ENV) PYTHONHASHSEED=0 $(VENV)/bin/python tools/mutate.py \
	    --sample $(SAMPLE) --seed $(SEED) --only '$(ONLY)' --workers $(WORKERS)

# Random networks, folded and judged: docs/trust.md. Fresh seeds each time, COUNT of them.
COUNT ?= 5000
TARGETS := --target torch --target ort --target inductor
fuzz: $(READY)
	$(ENV) $(VENV)/bin/python -m refold fuzz --count $(COUNT) --workers $(WORKERS) \
	    $(TARGETS)

# The same seeds each time, so that no change is stopped by what it did not touch.
fuzz-ci: $(READY)
	$(ENV) $(VENV)/bin/python -m refold fuzz --seed 1 --count 3000 --workers $(WORKERS) \
	    $(TARGETS)

lint: $(READY)
	$(PIP) mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# torch first and pinned, so that nothing after it chooses another build. timm and torchvision come
# without their dependencies: refold needs their model definitions, not their own choice of torch.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	$(PIP) --editable '.[ort,openvino,shiftadd,test]'
	$(PIP) pyyaml huggingface_hub safetensors pillow transformers peft distributed
	$(PIP) --no-deps timm torchvision
	@touch $@

clean:
	rm -rf $(VENV) $(EDGE) $(RTX) build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
