# `make help` explains every target.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
PEER := .venv-peer
OUT ?= out
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' feddymem/__init__.py)
VARIANT ?= cpu
IMAGE ?= feddymem$(if $(filter cuda,$(VARIANT)),-cuda):$(VERSION)
ENGINE ?= $(shell command -v podman || command -v docker)
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup demo clients test deploy-test monitor-test fuzz soak check k8s-check format protos rules dashboards breaking lock images wheels bench bench-gpu bench-peer clean

help:  ## Explain every target
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/installed  ## Make the virtual environment from the locked versions (7 GB: PyPI's torch carries CUDA)

# No requirement is built from source, and setuptools for our own package comes from the lock as well.
$(VENV)/installed: requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: setup  ## Run a federation on this machine and write OUT/report.html; DATA=DIR for your own site folders
	$(BIN)/feddymem demo --out $(OUT) $(if $(DATA),--data $(DATA))

clients: $(CLIENTS)/installed  ## Make the environment of the tests' Open Inference clients, which need an older protobuf

$(CLIENTS)/installed: requirements-clients.lock
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-clients.lock
	touch $@

test: setup clients  ## Run all tests (those that need a GPU are skipped where there is none)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

deploy-test: setup  ## Build the image and run the dev overlay in containers, without a cluster: load, kills, updates (Debian, root)
	tests/deploy/run.sh

monitor-test: setup  ## Have a real Prometheus and Alertmanager watch a federation that breaks and is mended (Debian, root)
	tests/monitoring/install
	$(BIN)/python -m pytest tests/monitoring -m monitor

fuzz: setup  ## Send 10,000 malformed calls to real services, then look for more, guided by coverage; SECONDS_EACH=600
	$(BIN)/python -m tests.fuzz.malformed --inputs 10000
	mkdir -p $(OUT)/fuzz
	for target in images rpcs releases; do \
	  $(BIN)/python -m tests.fuzz.targets $$target -max_total_time=$(SECONDS_EACH) -artifact_prefix=$(OUT)/fuzz/; \
	done

SECONDS_EACH ?= 600

soak: setup  ## Kill, cut off and damage everything at every moment, then half an hour at work (an hour in all)
	$(BIN)/python -m tests.fuzz.malformed --inputs 10000
	$(BIN)/python -m tests.chaos.matrix --random 100
	CHAOS_REPEATS=10 $(BIN)/python -m pytest tests/chaos/test_partitions.py tests/chaos/test_proxy.py
	$(BIN)/python -m tests.chaos.soak --minutes 30

check: setup k8s-check  ## Formatter, linter, strict types, import rules, protos, stale generated files, manifests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && buf lint
	$(BIN)/python -m tests.generated_code
	$(BIN)/python -m tests.monitoring.prometheus_rule
	$(BIN)/python -m tests.monitoring.dashboards
	$(BIN)/hadolint Dockerfile

k8s-check: setup  ## Build all overlays; hold them against two versions of Kubernetes, and against each other
	$(BIN)/python -m tests.k8s.check

format: setup  ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: setup  ## Generate feddymem/v1 and feddymem/openinference from protos/
	$(BIN)/python -m tests.generated_code write

rules: setup  ## Put monitoring/rules.yaml into the object for the Prometheus operator
	$(BIN)/python -m tests.monitoring.prometheus_rule write

dashboards: setup  ## Write monitoring/dashboards from the panels in tests/monitoring/dashboards
	$(BIN)/python -m tests.monitoring.dashboards write

breaking: setup  ## Compare the contract with the one of BASE (default: the last commit); fails on a breaking change
	cd protos && buf breaking --against '../.git#ref=$(or $(BASE),HEAD),subdir=protos'

lock: setup  ## Lock the newest versions that pyproject.toml allows; PyTorch for CPUs stays at the one named here
	$(BIN)/pip-compile $(LOCK_FLAGS) --generate-hashes --output-file requirements-cuda.lock pyproject.toml
	mkdir -p $(OUT)
	sed -n 's/^\([^ ]*==[^ ]*\).*/\1/p' requirements-cuda.lock | grep -Ev '^(torch|torchvision)==' > $(OUT)/as-cuda.txt
	$(FOR_CPU) | $(BIN)/pip-compile $(LOCK_FLAGS) --generate-hashes --no-annotate --constraint $(OUT)/as-cuda.txt \
	  --output-file requirements-cpu.lock -
	$(BIN)/pip-compile $(LOCK_FLAGS) --extra dev --extra evaluation --constraint requirements-cuda.lock --output-file requirements-dev.lock pyproject.toml
	$(BIN)/pip-compile $(LOCK_FLAGS) --output-file requirements-clients.lock requirements-clients.in
	$(BIN)/pip-compile $(LOCK_FLAGS) --output-file requirements-peer.lock requirements-peer.in

# Our dependencies without CUDA. PyTorch's builds for CPUs are not on PyPI, so that their version is named here.
FOR_CPU := sed -n '/^dependencies = /,/^]/s/^ *"\(.*\)",/\1/p' pyproject.toml \
  | sed 's/^faiss-gpu/faiss-cpu/; s/^torch>=.*/torch==2.13.0+cpu/'

LOCK_FLAGS := --quiet --upgrade --strip-extras --allow-unsafe --no-header \
  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links

images: wheels  ## Build the container image with podman or docker; VARIANT=cuda for NVIDIA GPUs, BASE_IMAGE=...
	$(ENGINE) build --tag $(IMAGE) \
	  --build-arg VARIANT=$(VARIANT) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(shell git rev-parse HEAD) $(BUILD_FLAGS) .

wheels:  ## Fetch the packages of an image into wheels/VARIANT; cpu needs PyTorch's index of CPU builds in pip's settings
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --dest wheels/$(VARIANT) --no-deps --only-binary :all: \
	  --python-version 3.11 $(PLATFORMS) --requirement requirements-$(VARIANT).lock

# What the base image's C library (2.36) runs.
PLATFORMS := $(foreach minor,$(shell seq 5 36),--platform manylinux_2_$(minor)_x86_64) --platform manylinux2014_x86_64

bench: setup  ## Measure everything (half an hour on a quiet machine); writes benchmarks/results; DATA="DIR..." for parity, poisoning and calibration on real sets
	$(BIN)/python -m benchmarks.inspection
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.edge
	$(BIN)/python -m benchmarks.edge_memory
	$(BIN)/python -m benchmarks.release_swaps
	$(BIN)/python -m benchmarks.scraping
	$(if $(DATA),$(BIN)/python -m benchmarks.runtimes $(DATA))
	$(if $(DATA),$(BIN)/python -m benchmarks.poisoning $(DATA))
	$(if $(DATA),$(BIN)/python -m benchmarks.calibration $(DATA))
	$(BIN)/python -m benchmarks.table

bench-gpu: setup  ## Measure backbone and search on a GPU (on the CPU where there is none)
	$(BIN)/python -m benchmarks.gpu

bench-peer: setup $(PEER)/installed  ## Measure anomalib's PatchCore against our service, in an environment of its own (7 GB)
	$(BIN)/python -m benchmarks.peer --python $(PEER)/bin/python

$(PEER)/installed: requirements-peer.lock
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peer.lock
	touch $@

clean:  ## Remove everything that make made
	rm -rf $(VENV) $(CLIENTS) $(PEER) $(OUT) wheels build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
