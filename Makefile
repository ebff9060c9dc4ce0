# Every command of the project in one word; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help install demo tables table1 table2 table3 table4 losses options search study spectral family efficiency figures dry gpu test docs lab wheel lock export check lint format hooks clean

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
BENCH ?= glyphs-20
JOBS ?= 2
# notebooks and tests wait now and then for what they start, so that one more than there are cores runs at once
WORKERS ?= $(shell $(PY) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
TARGET ?= tables

export PATH := $(BIN):$(PATH)
# glibc gives large freed blocks back to the system at once, which costs half of a training on a CPU
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 1073741824
# threads that wait must not spin: with another process running they would slow it down
export OMP_WAIT_POLICY := PASSIVE
export PYDEVD_DISABLE_FILE_VALIDATION := 1

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make .venv unless an environment is active, and install sptseg with its tools
	@echo "sptseg is installed in $(ENV)"

demo: SEEDS ?= 0
# one thread: the demo's matrices are so small that a second one costs more than it brings
demo: $(STAMP) ## train ZegCLIP and SPT-SEG on the built-in benchmark, compare them (SEEDS=0,1,2: three times)
	@mkdir -p $(DEMO)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m papermill --log-output --no-progress-bar nbs/runs/demo.ipynb $(DEMO)/demo.ipynb -f nbs/experiments/demo/demo.yaml \
		-y '{seeds: [$(SEEDS)], command: "make demo SEEDS=$(SEEDS)"}'
	@echo "executed notebook: $(DEMO)/demo.ipynb"
	@find $(DEMO) -name '*.png' | sort | sed 's/^/figure: /'

# see Snakefile; Snakemake's own lock would survive a kill, so the Snakefile takes another one
define batch
	@$(PY) -c 'import sys; sys.version_info < (3, 11) and sys.exit("error: the batch needs Python 3.11 or newer, as Snakemake does; single runs by papermill do not")'
	@echo "looking for what is missing or out of date for: $(1) (BENCH=$(BENCH)$(if $(SEEDS), SEEDS=$(SEEDS)) JOBS=$(JOBS))"
	@snakemake --cores $(JOBS) --jobs $(JOBS) --keep-going --rerun-incomplete --nolock --forcerun train draw_table draw_figures \
		--config bench=$(BENCH) $(if $(SEEDS),seeds=$(SEEDS)) --quiet host reason $(if $(2),$(2),rules progress) $(SNAKEMAKE) -- $(1)
endef
done = @echo "up to date: $(1)"

tables: $(STAMP) ## all tables, from the runs that they need (BENCH=glyphs-20|glyphs-stuff|voc|coco SEEDS=3 JOBS=2; without SEEDS as data/tables.yaml says)
	$(call batch,$@)
	@for file in figures/$(BENCH)-*.md; do echo "up to date: $$file"; done

table1: $(STAMP) ## Table 1: zero-shot segmentation
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

table2: $(STAMP) ## Table 2: spectral prompts and spectral guided decoder
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

table3: $(STAMP) ## Table 3: blocks with a spectral prompt
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

table4: $(STAMP) ## Table 4: decoder layers
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

losses: $(STAMP) ## table of losses
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

options: $(STAMP) ## table of the points where the authors' code and paper differ
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

search: $(STAMP) ## table of the trials that chose learning rate and batch of the built-in benchmark
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

study: $(STAMP) ## table of trainings four times as long
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

spectral: $(STAMP) ## table of settings where spectral prompts could help
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

family: $(STAMP) ## table of CLIP-RC, Cascade-CLIP, OTSeg and two baselines beside ZegCLIP and SPT-SEG
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

efficiency: $(STAMP) ## table of parameters, operations and speed
	$(call batch,$@)
	$(call done,figures/$(BENCH)-$@.md)

figures: $(STAMP) ## all figures, from the runs that they need
	$(call batch,$@)
	@for file in figures/$(BENCH)-*.png; do echo "up to date: $$file"; done

dry: $(STAMP) ## what `make tables` would run, or another target: make dry TARGET=table2
	$(call batch,$(TARGET),--dry-run)

gpu: $(STAMP) ## measure what needs a GPU, part by part (PARTS="environment demo": only these)
	$(PY) -m sptseg.paper.gpu $(PARTS)

test: $(STAMP) ## check that all is in sync and formatted, run every notebook and every test
	@echo "== 1/4 notebooks are clean; library and README are in sync with them"
	@$(PY) tests/sync.py check
	@echo "== 2/4 ruff on notebooks and tests; imports follow the layers"
	@ruff check nbs tests
	@ruff format --check nbs tests
	@lint-imports --no-cache --no-logo
	@echo "== 3/4 every notebook runs (nbdev_test)"
	@OMP_NUM_THREADS=1 nbdev_test --n_workers $(WORKERS) --timing
	@echo "== 4/4 pytest"
	@$(PY) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

docs: $(STAMP) ## build the documentation site in _site/ and check its links
	@$(PY) -c 'import mkdocs, material, latex2mathml' 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "site: _site/index.html; search needs a server: python -m http.server --directory _site"

lab: $(STAMP) ## open JupyterLab on the notebooks
	@echo "make hooks, once, keeps git clean of outputs that change with every run"
	jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs $(if $(filter 0,$(shell id -u)),--allow-root)

wheel: $(STAMP) ## build wheel and source archive into dist/
	@rm -rf build
	$(PY) -m build
	@rm -rf build

lock: ## pin new requirements in requirements.lock, which keeps its versions (needs uv)
	uv pip compile pyproject.toml --extra notebooks --extra batch --python-version 3.11.7 --python-platform linux --quiet \
		--generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock" --output-file requirements.lock

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
	@echo "changes in this checkout: .git/config, .git/hooks, .gitconfig"
	@echo "changes in your account: $$HOME/.jupyter/jupyter_{server,notebook}_config.py, which clean the notebooks of every nbdev project when saved"
	nbdev_install_hooks
	pre-commit install

clean: ## remove caches and built packages; environments, data and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .snakemake _proc _site
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
