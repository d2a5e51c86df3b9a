# `make demo` and `make test` create .venv with Python 3.12 on the first call. Where nvidia-smi works, JAX's CUDA plugin is
# installed as well and both commands use the GPU.

GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo ,cuda)
EXTRAS := torch,jax,test$(GPU)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(EXTRAS)
PYTHON ?= $(shell for p in python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$p && break; done)

# JAX would otherwise reserve most of the GPU's memory, which it shares with PyTorch here.
export XLA_PYTHON_CLIENT_PREALLOCATE := false

.PHONY: demo test lint bench clean

demo: $(INSTALLED)
	$(BIN)/python -m examples.batch_invariance

# The linter and the type checker need one core for half a minute: they run beside the tests, and what they say comes last.
test: $(INSTALLED)
	@$(MAKE) --no-print-directory lint >$(VENV)/lint.log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -n 2 --dist worksteal; tests=$$?; \
	wait $$lint; linted=$$?; cat $(VENV)/lint.log; exit $$((tests | linted))
ifdef GPU
	$(BIN)/python -m pytest -m gpu
endif

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.gemm
	$(BIN)/python -m benchmarks.rows
	$(BIN)/python -m benchmarks.model

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.12 not found: install it, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV)
