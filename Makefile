# Each target sets up all it needs in .venv: `make demo` and `make test` work in a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# What the stages compute, and how; the rest of the tests has nothing to do with the device.
ON_GPU := gpu link split_equals_one_process compression decoupling evaluation saving stopping logs startup support \
	scaler lightning_features tied data_parallel lost_stages strategy randomness errors batch_mismatch sharded merge paging \
	exact guard one_process updates time_boundary
FOLDERS_ON_GPU := tests/inputs tests/recurrent
# The file of such a test, in tests/ or in a folder of it.
test_of = $(or $(wildcard tests/test_$(1).py tests/*/test_$(1).py),$(error tests/ has no test_$(1).py))

# Two workers; the tests of one file stay together, because they share fixtures.
PARALLEL := -n 2 --dist loadfile

# Other people's packages, beside those of .venv, which has the one torch.
CLIENTS := .venv-clients

.PHONY: demo check test test-gpu test-clients test-lowest test-py313 docs lint clean

demo: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.demo

# For the loop at the desk: what one process can test of the package, a test of several, and the lines not reached.
check: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -m "smoke or not (processes or slow)" --cov \
		--ignore tests/benchmarks --ignore tests/examples

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

# One GPU is enough. Not for CI, which has none.
test-gpu: $(INSTALLED)
	LIGHTNING_SG_TEST_DEVICE=cuda OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		$(foreach name,$(ON_GPU),$(call test_of,$(name))) $(FOLDERS_ON_GPU)

# Models of packages that nobody here wrote. Minutes; not for CI.
test-clients: $(CLIENTS)/.installed
	LIGHTNING_SG_TEST_CLIENTS=1 OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest -n 2 --dist loadgroup tests/clients

# The package's lower bounds, and another Python; each in an environment of its own. Minutes to install; not for CI.
LOWEST := .venv-lowest
PY313 := .venv-py313
PYTHON313 ?= python3.13
QUICK := -q -m "smoke or not (processes or slow)" --ignore tests/benchmarks --ignore tests/examples --ignore tests/clients

test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(PARALLEL) $(QUICK)

test-py313: $(PY313)/.installed
	OMP_NUM_THREADS=1 $(PY313)/bin/python -m pytest $(PARALLEL) $(QUICK)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt \
		-e '.[cli,report]' cloudpickle hatchling pytest pytest-cov pytest-rerunfailures pytest-timeout \
		pytest-xdist pytorch-lightning ruff scikit-learn tensorboard
	touch $@

$(PY313)/.installed: pyproject.toml constraints.txt
	test -x $(PY313)/bin/python || $(PYTHON313) -m venv $(PY313)
	$(PY313)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(PY313)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The documentation site, in docs/_build/html. A warning is an error, and so is an error in a tutorial, all of which run.
docs: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(BIN)/python -m sphinx -W --keep-going -q \
		-d docs/_build/doctrees docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(CLIENTS) $(LOWEST) $(PY313) docs/_build

# torch is named on its own: the exact version picks the build that fits a machine without a GPU.
$(INSTALLED): pyproject.toml constraints.txt docs/requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "lightning-sg needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[dev]' -r docs/requirements.txt
	touch $@

# It sees the packages of .venv by a path file. Every other package is pinned and comes without its dependencies.
$(CLIENTS)/.installed: tests/clients/requirements.txt $(INSTALLED)
	test -x $(CLIENTS)/bin/python || $(BIN)/python -m venv $(CLIENTS)
	packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$packages" > "$$($(CLIENTS)/bin/python -c "$$packages")/development.pth"
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@
