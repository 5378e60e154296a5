# Each target sets up all it needs in .venv: `make demo` and `make test` work in a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# What the stages compute, and how; the rest of the tests has nothing to do with the device.
ON_GPU := gpu transport split_equals_one_process strategy tied replicas recurrent_stages features message_boundary \
	errors paging sharded exact synthetic_inputs random_updates guard one_process recurrent

.PHONY: demo test test-gpu lint clean

demo: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.demo

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# One GPU is enough. Not for CI, which has none.
test-gpu: $(INSTALLED)
	LIGHTNING_SG_TEST_DEVICE=cuda OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ON_GPU:%=tests/test_%.py)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

# torch is named on its own: the exact version picks the build that fits a machine without a GPU.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "lightning-sg needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
