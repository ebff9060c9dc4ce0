# Every command of the project in one word; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help install demo test lab wheel export check lint format hooks clean

# An active environment is used as it is (conda's base is left alone); otherwise .venv is made here.
PYTHON ?= python3
ifneq ($(VIRTUAL_ENV),)
  ENV := $(VIRTUAL_ENV)
  BIN := $(ENV)/bin
else ifneq ($(and $(CONDA_PREFIX),$(filter-out base,$(CONDA_DEFAULT_ENV))),)
  ENV := $(CONDA_PREFIX)
  BIN := $(ENV)/bin
else
  ENV := .venv
  BIN := $(CURDIR)/.venv/bin
endif
PY := "$(BIN)/python"
# The stamp's name holds a checksum of what decides the installation: nothing is installed while it exists.
STAMP := $(ENV)/.sptseg-$(shell { pwd; cat pyproject.toml settings.ini; } | cksum | cut -d ' ' -f 1)
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
DEMO := data/runs/demo
SEEDS ?= 0

export PATH := $(BIN):$(PATH)
# glibc gives large freed blocks back to the system at once, which costs half of a training on a CPU
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 1073741824
# threads that wait must not spin: with another process running they would slow it down
export OMP_WAIT_POLICY := PASSIVE
export PYDEVD_DISABLE_FILE_VALIDATION := 1

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make .venv unless an environment is active, and install sptseg with its tools
	@echo "sptseg is installed in $(ENV)"

# one thread: the demo's matrices are so small that a second one costs more than it brings
demo: $(STAMP) ## train ZegCLIP and SPT-SEG on the built-in benchmark, compare them (SEEDS=0,1,2: three times)
	@mkdir -p $(DEMO)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m papermill --log-output --no-progress-bar nbs/runs/demo.ipynb $(DEMO)/demo.ipynb -f nbs/experiments/demo/demo.yaml \
		-y '{seeds: [$(SEEDS)], command: "make demo SEEDS=$(SEEDS)"}'
	@echo "executed notebook: $(DEMO)/demo.ipynb"
	@find $(DEMO) -name '*.png' | sort | sed 's/^/figure: /'

test: $(STAMP) ## check that all is in sync and formatted, run every notebook and every test
	@echo "== 1/4 notebooks are clean; library and README are in sync with them"
	@$(PY) tests/sync.py check
	@echo "== 2/4 ruff on notebooks and tests"
	@ruff check nbs tests
	@ruff format --check nbs tests
	@echo "== 3/4 every notebook runs (nbdev_test)"
	@OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --timing
	@echo "== 4/4 pytest"
	@$(PY) -m pytest -q

lab: $(STAMP) ## open JupyterLab on the notebooks
	jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs $(if $(filter 0,$(shell id -u)),--allow-root)

wheel: $(STAMP) ## build wheel and source archive into dist/
	@rm -rf build
	$(PY) -m build
	@rm -rf build

export: $(STAMP) ## clean the notebooks, export the library and the README from them
	@$(PY) tests/sync.py export

check: $(STAMP) ## say which files are out of sync with the notebooks
	@$(PY) tests/sync.py check

lint: $(STAMP) ## ruff on notebooks and tests, nothing changed
	ruff check nbs tests
	ruff format --check nbs tests

format: $(STAMP) ## ruff's fixes and formatting of notebooks and tests
	ruff check --fix nbs tests
	ruff format nbs tests

hooks: $(STAMP) ## git and Jupyter hooks: clean on save, merge notebooks, check before each commit
	nbdev_install_hooks
	pre-commit install

clean: ## remove caches and built packages; environments, data and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache _proc
	find nbs sptseg tests data figures -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(ENV)/bin/python:
	@test "$(ENV)" = .venv || { echo "error: the active environment $(ENV) has no bin/python; deactivate it" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { echo "error: $(PYTHON) is not Python 3.10 to 3.13; name one: make install PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(STAMP): | $(ENV)/bin/python
	@$(PY) -c '$(SUPPORTED)' || { echo "error: the environment $(ENV) is not Python 3.10 to 3.13; use another or deactivate it" >&2; exit 1; }
	@echo "installing sptseg and its tools in $(ENV): some minutes, about 6 GB with PyTorch's CUDA libraries"
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(PY) -m pip check || echo "warning: packages of $(ENV) contradict each other (above)" >&2
	@rm -f $(ENV)/.sptseg-*
	@touch $@
