# Two commands for a fresh clone: `make demo` and `make test`. They need Python and pip alone.
PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/pip install -qq --disable-pip-version-check --constraint constraints.txt
READY  := $(VENV)/.ready
# One thread a worker: kernels that compete for cores make the suite slower, not faster.
ENV    := OMP_NUM_THREADS=1 PYTHONPATH=.
WORKERS ?= 2

.PHONY: demo test quick slow lint format clean

demo: $(READY)
	$(ENV) $(VENV)/bin/python examples/demo.py

test: $(READY)
	$(VENV)/bin/ruff check .
	$(ENV) $(VENV)/bin/python -m pytest -q -n $(WORKERS)
	$(ENV) $(VENV)/bin/python -m pytest -q -n $(WORKERS) -m slow

quick: $(READY)
	$(ENV) $(VENV)/bin/python -m pytest -q -n $(WORKERS)

slow: $(READY)
	$(ENV) $(VENV)/bin/python -m pytest -q -n $(WORKERS) -m slow

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
	$(PIP) --editable '.[ort,test]'
	$(PIP) pyyaml huggingface_hub safetensors pillow
	$(PIP) --no-deps timm torchvision
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
