# Targets for users, developers and CI; `make help` lists them. The targets need Python >= 3.11, Go and make.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator
export CLUSTER KEEP
# Tests start hundreds of Python processes. Python must therefore write compiled modules (.pyc), even if the environment disables this.
export PYTHONDONTWRITEBYTECODE :=
# One thread per process, because ranks share the cores with the test that starts them. No test may download from the Hugging Face hub.
# Some virtual machines advertise the processor's AMX instructions but do not permit them. torch's 16-bit products would end with SIGILL there.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16
# Three test files run at a time, in the order of collection. The e2e tests take longest and come first in this order.
# With two workers on two cores, a third of the processor time was idle: tests wait for pods, API servers and time limits.
WORKERS ?= 3
PYTEST := $(TEST_ENV) .venv/bin/pytest -q -n $(WORKERS) --no-loadscope-reorder

.PHONY: help
help: ## List every target
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ First steps
.PHONY: demo
demo: setup ## Run one fine-tuning job from kubectl apply to a model in S3 (CLUSTER=kind|local|current; KEEP=1 keeps the cluster)
	@$(PY) scripts/demo.py

.PHONY: setup
setup: ## Create .venv from the locked requirements; all checkouts share the installed packages
	@scripts/setup.sh

.PHONY: packages
packages: setup ## Install the local cluster's Debian packages (needs root on Linux)
	@$(PY) -m localcluster packages --install

.PHONY: browser
browser: setup ## Install a headless Chromium for the tests of reports (needs root on Debian)
	@$(PY) scripts/report_screenshots.py --install

.PHONY: tools
tools: setup ## Build Helm and helm-docs from their Go modules and print the path of Helm
	@$(PY) scripts/tools.py

.PHONY: images
images: setup ## Build the operator image and the trainer image
	@$(PY) -m localcluster images build all

##@ Checks
# In these packages mypy only finds attributes, arguments and names that do not exist: most of their libraries have no types.
LOOSELY_TYPED := --check-untyped-defs --ignore-missing-imports --follow-imports=silent -p finetune_trainer -p finetune_cli \
  -p localcluster -p benchmarks -p tests

.PHONY: lint
lint: setup ## Run ruff, mypy (strict for the API and the operator), import-linter and a syntax check of the scripts
	@.venv/bin/ruff check .
	@.venv/bin/mypy --strict -p finetune_api -p finetune_operator
	@! .venv/bin/mypy $(LOOSELY_TYPED) | grep -E "\[(attr-defined|call-arg|name-defined)\]"
	@.venv/bin/lint-imports
	@bash -n scripts/*.sh .ci/run

.PHONY: generate
generate: setup ## Generate the CRD, the chart's copy of it and the reference pages from the API models
	@$(PY) scripts/generate.py

.PHONY: verify
verify: setup ## Fail if a generated file is out of date or `helm lint` fails for the chart
	@$(PY) scripts/generate.py --check
	@"$$($(PY) scripts/tools.py)" lint --quiet --set imageRegistry=registry.example.com helm/finetune-operator

.PHONY: docs
docs: setup ## Build the documentation site into build/site; fails for a dead link
	@$(PY) scripts/docs_site.py

.PHONY: locks
locks: ## Regenerate the lock files in requirements/ with the versions of dev.lock; bootstrap.lock, nodeps.lock and dev.lock stay
	@scripts/locks.sh

.PHONY: report-screenshot
report-screenshot: setup ## Train a tiny model and take the screenshots of its report for the docs, with a headless Chromium
	@$(PY) scripts/report_screenshots.py

##@ Tests
.PHONY: mutants
mutants: setup ## Mutation tests of the most important modules: MODULES="lease decide" chooses some, SAMPLE=150 tests only 150 mutants of each
	@$(PY) scripts/mutants.py $(MODULES) $(if $(SAMPLE),--sample $(SAMPLE))

.PHONY: test-quick
test-quick: tools ## Run unit, integration and pod tests; they need no images and no node
	@$(PYTEST) -m "not e2e and not image and not faults and not slow and not gpu"

VERSION ?= 3.12
.PHONY: test-python
test-python: ## Run the unit tests of API, operator and command line with another Python, without torch (VERSION=3.11, 3.12 or 3.13)
	@$(TEST_ENV) scripts/test-python.sh "$(VERSION)"

.PHONY: test
test: prepare verify ## Run all tests that must pass before a change is merged, including real pods
	@$(PYTEST) -m "not faults and not slow and not gpu"

.PHONY: e2e
e2e: prepare verify ## Run only the tests with a real node, real images and the installed operator
	@$(TEST_ENV) .venv/bin/pytest -q -m "e2e and not faults and not slow and not gpu"

.PHONY: tracker-servers
tracker-servers: setup ## Install an MLflow server and build a MongoDB-compatible server for the tests of trackers
	@$(PY) -m tests.support.tracker_servers

.PHONY: test-faults
test-faults: prepare verify tracker-servers browser docs ## Run the fault tests and the long tests
	@$(PYTEST) -m "(faults or slow) and not gpu"
	@$(MAKE) --no-print-directory test-stores

STORES ?= versity minio moto
STORE_TESTS := tests/faults/storage tests/integration/cli/test_storage.py tests/integration/cli/test_transfers.py \
  "tests/pod/test_resume.py::test_a_resumed_run_equals_an_uninterrupted_run[windows-lora-2-stop_pod]" \
  "tests/pod/test_resume.py::test_a_resumed_run_equals_an_uninterrupted_run[end-full-1-kill_pod]"

.PHONY: test-stores
test-stores: setup ## Run the tests of storage and two whole jobs against S3 servers of other make (STORES="versity minio moto" chooses some)
	@$(PY) -m tests.support.stores
	@for store in $(STORES); do \
	  echo "S3 server: $$store"; FINETUNE_TEST_STORE=$$store $(PYTEST) -m "not slow and not gpu" $(STORE_TESTS) || exit 1; done

.PHONY: test-gpu
test-gpu: setup ## Run the tests that need a CUDA device
	@HF_HUB_OFFLINE=1 .venv/bin/pytest -q -m gpu

.PHONY: gpu-kit
gpu-kit: setup ## Pack the packages that the GPU cells need on another machine (see benchmarks/gpu_cells.py)
	@$(PY) scripts/gpu_kit.py

.PHONY: prepare
prepare: setup ## Build Kubernetes, Helm, the images and the demo's model for the e2e tests, in parallel
	@$(PY) scripts/prepare.py

##@ Release
.PHONY: sbom
sbom: setup ## Write bills of materials (CycloneDX) and the licences of all Python packages into dist/
	@$(PY) scripts/sbom.py dist

.PHONY: release
release: setup ## Build wheel, chart, CRD, kubectl plugin, bills of materials and checksums of the last commit in dist/release (RELEASE_URL=https://..., IMAGES="name@sha256:...")
	@$(PY) scripts/release.py dist/release $(if $(RELEASE_URL),--url "$(RELEASE_URL)") $(foreach image,$(IMAGES),--image "$(image)")

.PHONY: scan
scan: setup ## Compare the locked Python packages with vulnerability reports in the OSV format: DB=folder
	@$(PY) scripts/scan.py "$(DB)"

##@ Measuring
.PHONY: bench-load
bench-load: setup ## Measure the operator under load, in three runs of some minutes each, on an otherwise idle machine
	@$(PY) benchmarks/operator_load.py --parts burst --rounds 1
	@$(PY) benchmarks/operator_load.py --parts idle,restart
	@$(PY) benchmarks/operator_load.py --parts steady

##@ Cleaning
.PHONY: down
down: ## Stop the demo's cluster
	@[ ! -x $(PY) ] || $(PY) scripts/demo.py --down

.PHONY: clean
clean: ## Remove build and cache files from this checkout
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: clean-all
clean-all: down clean ## Also remove .venv and all caches outside the checkout (images, tools, packages: gigabytes)
	@rm -rf .venv "$(CACHE)"
