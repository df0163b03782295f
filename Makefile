# The commands of the README. Each makes the environment that it needs; only Python 3.11 or newer must be there.

PYTHON ?= python3
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := $(wildcard constraints/python$(MINOR).txt)
PINS := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
INSTALL := -m pip install --quiet --disable-pip-version-check

GPU_TESTS ?= tests/gpu tests/parity/test_logits.py tests/parity/test_gradients.py tests/parity/test_generation.py

.PHONY: quickstart test lint nightly gpu reliability starter docs clean python

quickstart: .venv/installed  ## fine-tune the embedded starter model and show what changed
	.venv/bin/llmtune train configs/recipes/quickstart.yaml

test: .venv-test/installed  ## everything that must hold for a change to land
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/pyright --pythonpath .venv-test/bin/python
	.venv-test/bin/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0 --timeout 900 $(TESTS)

nightly: .venv-test/installed  ## the full grids
	.venv-test/bin/python -m pytest -q -m nightly

gpu: .venv-test/installed  ## the kernels of NVIDIA GPUs, and parity with transformers on one
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false .venv-test/bin/python -m pytest -q -n 6 -k "not devices and not sharded" $(GPU_TESTS)

reliability: .venv-test/installed  ## kills, damage, full disks, hangs at full size; writes the table of docs/reliability.md
	.venv-test/bin/python -m tests.reliability $(SIZE)

starter: .venv/installed  ## make the embedded starter model again, from its grammar
	.venv/bin/python -m starter.make

docs: .venv/installed  ## generate docs/configuration.md from the dataclasses
	.venv/bin/python -m docs.generate

.venv/installed: pyproject.toml $(CONSTRAINTS) | python
	$(PYTHON) -m venv .venv
	.venv/bin/python $(INSTALL) $(PINS) -e .
	@touch $@

.venv-test/installed: pyproject.toml $(CONSTRAINTS) | python
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(INSTALL) torch==2.13.0
	.venv-test/bin/python $(INSTALL) $(PINS) -e '.[test]'
	@touch $@

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "llmtune needs Python 3.11 or newer; found '$(PYTHON)' $(MINOR). Set one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -n "$(CONSTRAINTS)" || echo "no constraints for Python $(MINOR): taking the newest versions that pyproject.toml allows"

clean:
	rm -rf .venv .venv-test build dist *.egg-info .pytest_cache .ruff_cache
