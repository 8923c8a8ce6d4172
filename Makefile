# Two commands on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
SHELL := bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest
FIMBRIA := $(PY) -m fimbria.cli.main
KERNELS ?= 6.1 6.12
export PYTHONPATH := $(CURDIR)/src

.PHONY: help
help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up and build ---

.PHONY: setup setup-test venv build bpf native wheel image-context
setup:
	@scripts/setup

setup-test:
	@scripts/setup --test

$(VENV)/.stamp: requirements.lock
	@echo "python: installing locked dependencies into $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@echo "$(CURDIR)/src" >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fimbria-source.pth"
	@printf '#!%s\nfrom fimbria.cli.main import main\n\nmain()\n' "$(CURDIR)/$(PY)" >$(VENV)/bin/fimbria
	@chmod +x $(VENV)/bin/fimbria
	@touch $@

venv: $(VENV)/.stamp

bpf: setup
	@$(MAKE) -s -C bpf

native: setup venv
	@$(MAKE) -s -C src/fimbria/cni/shim
	@$(MAKE) -s -C src/fimbria/lab
	@$(PY) -m fimbria.kernel.build_libbpf

build: bpf native ## compile BPF objects, the CNI shim and the libbpf extension
	@$(PY) -m compileall -q src/fimbria # who can't keep it, as the guests of test-vm, would compile at every start

wheel: build ## a wheel with everything a node needs, in dist/
	@rm -f dist/*.whl
	@$(PY) -m hatchling build -t wheel

image-context: build ## what deploy/Dockerfile is built from, in dist/image
	@$(PY) scripts/image_context.py dist/image

# --- the demo ---

.PHONY: demo demo-down
demo: build ## set everything up and show the main job; leaves the lab running
	@$(FIMBRIA) demo

demo-down: ## remove every trace of the demo
	@$(FIMBRIA) lab down

# --- a real Kubernetes on this machine ---

KUBE ?= kube
BED := $(PY) -m tests.cluster.bed

.PHONY: kube-up kube-test kube-down
kube-up: setup-test build ## a real Kubernetes with Fimbria by its chart; KUBE=NAME for another one beside it
	@$(BED) up --install --name $(KUBE)

kube-test: setup-test build ## everything that is judged on a real cluster, upstream's conformance too; a table at the end
	@$(BED) test --name $(KUBE)

kube-down: ## remove every trace of it
	@$(BED) down --name $(KUBE)

# --- tests ---

.PHONY: test suites-here suites-elsewhere test-beds lint test-unit test-bpf test-lab test-kube test-cluster test-vm
# Two lanes side by side, for most of the time is waiting: for the API server's build, for pods, for a kernel that boots.
# Each suite's output appears when the suite has ended; all are run, whichever fail.
test: setup-test build ## everything that CI runs
	@$(MAKE) -s -j2 -Otarget --no-print-directory suites-here suites-elsewhere
	@echo "all tests passed"

suites-here:
	@for suite in lint test-unit test-bpf test-lab test-kube; do $(MAKE) -s $$suite || failed+=" $$suite"; done; \
	 [[ -z $$failed ]] || { echo "failed:$$failed" >&2; exit 1; }

suites-elsewhere: test-beds
	@for suite in test-cluster test-vm; do $(MAKE) -s $$suite || failed+=" $$suite"; done; \
	 [[ -z $$failed ]] || { echo "failed:$$failed" >&2; exit 1; }

test-beds: setup-test build ## what tests of a real cluster need: Kubernetes from its sources, images; once per version
	@$(PY) tests/kube/build.py cluster e2e etcd
	@$(PY) -m tests.cluster.images >/dev/null

lint: venv
	@$(PY) -m ruff check src tests scripts
	@$(PY) -m ruff format --check src tests scripts
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports

test-unit: build ## pure tests: unit, property, flow stories
	@$(PYTEST) -q tests/unit tests/properties tests/flow

test-bpf: setup-test build ## programs in this kernel, packet by packet
	@$(PYTEST) -q tests/bpf

test-lab: setup-test build ## several nodes in namespaces: kill, restart, upgrade, drift
	@$(PYTEST) -q tests/lab

test-kube: setup-test build ## the API suite and the main story against the real API server
	@$(PYTEST) -q tests/kube

test-cluster: setup-test build ## a real cluster, installed by the chart; without what takes long
	@$(PYTEST) -q -m 'not long' tests/cluster

test-vm: setup-test build ## other kernels in a virtual machine
	@$(PYTEST) -q tests/vm

# --- figures ---

.PHONY: bench
bench: setup-test build ## measure against baselines; writes docs/benchmarks.md and .json; GROUPS='NAME...' only some
	@$(PY) -m tests.bench $(GROUPS)

.PHONY: lock clean
lock: venv ## pin dependencies anew: all of them, and those that a node needs
	@test -x $(VENV)/bin/uv || $(VENV)/bin/pip install -q --disable-pip-version-check uv
	@$(VENV)/bin/uv pip compile -q --upgrade --generate-hashes --python-version 3.11 --group dev pyproject.toml -o requirements.lock
	@$(VENV)/bin/uv pip compile -q --generate-hashes --python-version 3.11 -c requirements.lock pyproject.toml -o requirements-runtime.lock

clean: ## remove what was built
	rm -rf $(VENV) src/fimbria/_bpf src/fimbria/_bin src/fimbria/kernel/*.so dist build
