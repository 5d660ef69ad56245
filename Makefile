# What people and CI run. `make help` lists it; nothing here needs more than Python >= 3.11, Go and make.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator
export CLUSTER KEEP
# Ranks and supervisors are started hundreds of times: compiled modules are worth keeping, whatever the machine's habit is.
export PYTHONDONTWRITEBYTECODE :=
# Ranks of a test share two cores with the test itself.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# Two files at a time: while the tests with real pods wait for a cluster, the others compute. In the order they are found: the longest chain begins first.
WORKERS ?= 2
PYTEST := $(TEST_ENV) .venv/bin/pytest -q -n $(WORKERS) --no-loadscope-reorder

.PHONY: help
help: ## List every target
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ First steps
.PHONY: demo
demo: setup ## One fine-tuning job from kubectl apply to a model in S3 (CLUSTER=kind|local|current, KEEP=1 leaves the cluster up)
	@$(PY) scripts/demo.py

.PHONY: setup
setup: ## Make .venv from the locked requirements, shared between checkouts
	@scripts/setup.sh

.PHONY: packages
packages: setup ## Install the Debian packages that the local cluster needs (root, Linux)
	@$(PY) -m localcluster packages --install

.PHONY: tools
tools: setup ## Build Helm from its Go module, once a version; prints its path
	@$(PY) scripts/tools.py

.PHONY: images
images: setup ## Build the operator's and the trainer's image from their Dockerfiles
	@$(PY) -m localcluster images build all

##@ Checks
.PHONY: lint
lint: setup ## ruff, mypy (strict for the API and the operator), layers, shell scripts
	@.venv/bin/ruff check .
	@.venv/bin/mypy --strict -p finetune_api -p finetune_operator
	@.venv/bin/lint-imports
	@bash -n scripts/*.sh .ci/run

.PHONY: generate
generate: setup ## Write what is made from the API's models: the CRD, and the chart's copy of it
	@$(PY) scripts/generate.py

.PHONY: verify
verify: setup ## Fail if a generated file differs from its source, or the chart does not lint
	@$(PY) scripts/generate.py --check
	@"$$($(PY) scripts/tools.py)" lint --quiet helm/finetune-operator

.PHONY: locks
locks: setup ## Write requirements/{operator,trainer,cli}.lock again, with the versions of dev.lock
	@scripts/locks.sh

##@ Tests
.PHONY: mutants
mutants: setup ## Mutation tests of the most important modules: MODULES="lease decide" chooses some (minutes to hours)
	@$(PY) scripts/mutants.py $(MODULES)

.PHONY: test-quick
test-quick: tools ## Unit, integration and pod tests: no images, no node
	@$(PYTEST) -m "not e2e and not faults and not slow and not gpu"

.PHONY: test
test: prepare verify ## Everything that must hold before a change lands, real pods included
	@$(PYTEST) -m "not faults and not slow and not gpu"

.PHONY: e2e
e2e: prepare verify ## Only the tests with a real node, real images and the installed operator
	@$(TEST_ENV) .venv/bin/pytest -q -m "e2e and not faults and not slow and not gpu"

.PHONY: test-faults
test-faults: prepare verify ## The long fault matrices
	@$(PYTEST) -m "(faults or slow) and not gpu"

.PHONY: test-gpu
test-gpu: setup ## Tests that need a CUDA device
	@HF_HUB_OFFLINE=1 .venv/bin/pytest -q -m gpu

.PHONY: prepare
prepare: setup ## Do the slow one-time work of the e2e tests side by side: Kubernetes, Helm, images, the demo's model
	@$(PY) scripts/prepare.py

##@ Measuring
.PHONY: bench-load
bench-load: setup ## The operator under load, in three runs of some minutes each; wants a machine of its own (KWOK is built once, from its Go module)
	@$(PY) benchmarks/operator_load.py --parts burst --rounds 1
	@$(PY) benchmarks/operator_load.py --parts idle,restart
	@$(PY) benchmarks/operator_load.py --parts steady

##@ Cleaning
.PHONY: down
down: ## Take the demo's cluster down
	@[ ! -x $(PY) ] || $(PY) scripts/demo.py --down

.PHONY: clean
clean: ## Remove what builds and checks left in this checkout
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: clean-all
clean-all: down clean ## Also remove .venv and every cache outside the checkout (images, tools, packages: gigabytes)
	@rm -rf .venv "$(CACHE)"
