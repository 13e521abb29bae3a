# make demo   sets up .venv and runs the main job      make test   sets up .venv and runs the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Behind a slow or closed network, PIP_FLAGS="--no-index --find-links DIR" installs from local files.
PIP_FLAGS ?=

# Python keeps the modules that it has compiled: the processes of the tests would compile them all again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test bits check docs slow clean

demo: $(VENV)/.installed
	$(BIN)/clpet train

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

# The fast tests that compare bits, with the kernels of a processor without AVX-512; they run in fp32 on one thread.
bits: $(VENV)/.installed
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -q -n 2 -m "bits and not slow and not slurm and not gpu and not network"

check: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

# The site, in site/: warnings and broken links are errors.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "slow and not gpu and not network"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[all,offline,dev]"
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
