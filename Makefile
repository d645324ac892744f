# Debian and Ubuntu need: apt-get install python3 python3-venv make
# TORCH chooses the build, e.g. make install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo test check format lint types coverage bench gpu-check reference docs package package-clean wheels-gpu clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: install
	$(BIN)/python examples/digits.py --out runs/digits.png
	@echo "next, pictures of a Stable Diffusion 3 in four to five minutes: $(BIN)/diffalign train shapeworld_tmpo"

# apart from the rest: peft imports bitsandbytes where it finds it, which on a CPU prints a line about a missing kernel into every run
$(VENV)/.quantized: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[quantized]"
	touch $@

# processes that share the tests; each takes a core and some 1.5 GiB
WORKERS ?= 2

# one thread each: torch on tiny tensors is slower with more, and tests start processes of their own
test: install $(VENV)/.quantized
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

check: install format lint types test

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

coverage: install $(VENV)/.quantized
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov=diffalign --cov-report=term-missing:skip-covered

bench: install
	$(BIN)/python -m benchmarks cost overhead

# on a machine with a GPU (any torch with CUDA; without a network: make wheels-gpu): what must be true there, in some eight minutes on an H100.
# PARTS="contract demo" chooses; without a GPU it takes the pretended device and tiny models
PARTS ?=
GPU_PYTHON ?= python3
gpu-check:
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(GPU_PYTHON) -m benchmarks break gpu $(if $(PARTS),--only $(PARTS)) --json gpu-check.json

# what is written from the constructors
reference: install
	$(BIN)/python book/configuration.py
	$(BIN)/python book/public_names.py

# the book, in site/; a broken link fails
docs: install
	$(BIN)/python -m mkdocs --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict

# wheel and sdist in dist/; the wheel is installed into an environment of its own and trains outside the checkout
package: install
	$(BIN)/python book/package.py

# the same with every dependency installed anew from the index, as a user does
package-clean: install
	$(BIN)/python book/package.py --clean

# in wheels/: what a machine with Python 3.12 and a CUDA build of torch, but without a network, lacks
wheels-gpu: install
	$(BIN)/python book/wheels.py

clean:
	rm -rf $(VENV) runs dist wheels site gpu-check.json .pytest_cache .mypy_cache .ruff_cache
