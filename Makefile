# The environment is shared between checkouts and lies outside of them; see .ci/environment.py. `.venv` links to it.
SHELL := /bin/bash
# The first Python that fits and can make a virtual environment.
PROBE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c '$(PROBE)' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
# Two processes of one thread: several OpenMP threads on busy cores are slower than one, and tests are small.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# tests/conftest.py puts the longest files first; xdist would put those with most tests first.
PYTEST := pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Of these, the slow tests.
MATRIX := tests/simulated_gpu tests/runtime tests/attention tests/distributed tests/evaluation tests/policy \
	tests/loading/test_first_layers.py tests/loading/test_loading_memory.py tests/helm/test_hybrids.py \
	tests/helm/test_equality.py::test_a_real_model_on_few_instances tests/runs/test_gpu_check.py \
	"tests/runs/test_kill.py::test_killed_suite_equals_an_undisturbed_one[1-True]"

.PHONY: help env lint test test-all test-versions test-harnesses test-matrix test-ray gate demo end-to-end clean

help:  ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env:  ## Build the environment if it is missing, and point it at this checkout.
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 with venv found. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) .ci/environment.py

lint: env  ## Check style and types.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --cache-dir $(BIN)/../mypy_cache

test: lint  ## Check style and types, and run the tests but the slow ones.
	@$(TEST_ENV) $(BIN)/$(PYTEST) -m "not slow"

test-all: lint  ## Run all tests.
	@$(TEST_ENV) $(BIN)/$(PYTEST)

test-versions: env  ## Run what depends on transformers with its lowest version allowed, or with VERSIONS="5.20.0 5.22.2".
	@$(TEST_ENV) $(BIN)/python .ci/test_versions.py $(VERSIONS)

test-harnesses: env  ## Run the tests of the adapters of Inspect and lm-eval, or of HARNESSES="inspect", in environments of their own.
	@$(TEST_ENV) $(BIN)/python .ci/test_harnesses.py $(HARNESSES)

test-matrix: env  ## Run every family, placement and limit, on the simulated GPU and off it, of which `test` runs a part.
	@$(TEST_ENV) $(BIN)/$(PYTEST) --dist load -m slow -k "not broadly" $(MATRIX)

test-ray: env  ## Run a suite over two Ray workers, one of which is killed.
	@$(TEST_ENV) $(BIN)/python .ci/test_ray.py

gate: env  ## Check on a real model that placement and block sizes change no bit, with INSTANCES="5" of each run entry.
	@$(TEST_ENV) $(BIN)/python .ci/gate.py $(addprefix -m ,$(INSTANCES))

demo: env  ## Evaluate a real model on real questions with HELM and print the scores.
	@$(BIN)/python -m flexgen_helm.runs.quickstart

end-to-end: env  ## Evaluate a real model under a memory limit, in 16 bits and compressed: plan, prediction, report and gate.
	@$(BIN)/python -m flexgen_helm.runs.end_to_end

clean:  ## Remove build outputs and tool caches of this checkout.
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
