# Both targets need python3 (3.11 or newer) with venv, and a package index; nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean docs/cli.md

demo: .venv/demo-installed
	$(BIN)/swsc demo --out demo-output

# Two processes for what has no Ray; clusters one after the other, each wants the machine for itself. A part that fails holds up
# none of the others. Each part ends with its slowest tests. KERNELS=avx2 (sse4, cbwr-avx2, compatible: tests/support/kernels.py) runs
# them as on another processor.
test: export KERNELS := $(or $(KERNELS),native)
test: SLOWEST := --durations=15 --durations-min=1
test: .venv/test-installed
	@failed=0; set -x; \
	$(BIN)/python -m pytest $(SLOWEST) -n 2 --dist loadfile tests/unit tests/integration tests/cuda_stand_in || failed=1; \
	$(BIN)/python -m pytest $(SLOWEST) tests/cluster tests/gpu tests/vllm || failed=1; \
	{ set +x; } 2>/dev/null; exit $$failed

check: .venv/test-installed
	@failed=0; set -x; \
	$(BIN)/ruff check . || failed=1; \
	$(BIN)/ruff format --check . || failed=1; \
	$(BIN)/mypy || failed=1; \
	$(BIN)/python -m jobs.command_line.docs --check || failed=1; \
	{ set +x; } 2>/dev/null; exit $$failed

docs/cli.md: .venv/test-installed
	$(BIN)/python -m jobs.command_line.docs

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# torch first and by its pinned version: a plain install would take the newest build, with gigabytes of CUDA.
.venv/demo-installed: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

.venv/test-installed: .venv/demo-installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv demo-output
