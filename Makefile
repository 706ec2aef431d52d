# Every target makes the environment it needs: .venv, with the versions of requirements.lock.
SHELL := /bin/bash
PYTHON ?= python3
EXPERIMENT ?= config/quick.yaml
ifeq ($(wildcard $(EXPERIMENT)),)
$(error there is no experiment file $(EXPERIMENT))
endif
NAME := $(shell sed -n 's/^name: *["'\'']\{0,1\}\([a-z0-9_]*\).*/\1/p' "$(EXPERIMENT)")
READY := .venv/.installed
RUN := source .venv/bin/activate &&
SNAKEMAKE := $(RUN) snakemake --configfile "$(EXPERIMENT)"

.PHONY: reproduce tune figures report leaderboard test test-slow benchmark lint lock

reproduce: $(READY)
	$(SNAKEMAKE) --cores all
	$(MAKE) report

tune: $(READY)
	$(SNAKEMAKE) --cores all tune

figures: $(READY)
	$(SNAKEMAKE) --cores all --until figures

# Needs finished results: claims are judged on what is there, and snakemake reports on it.
report: $(READY)
	$(SNAKEMAKE) --cores 1 --allowed-rules claims -- claims
	$(SNAKEMAKE) --cores 1 --allowed-rules claims overview -- overview
	$(SNAKEMAKE) --cores 1 --report results/$(NAME)/report.html

# The leaderboard in README.md, between its two markers, from the reference run.
leaderboard:
	@grep -q '^<!-- leaderboard -->$$' README.md || { echo "README.md lacks the two markers"; exit 1; }
	sed -i -e '/^<!-- leaderboard -->$$/,/^<!-- end of leaderboard -->$$/{//!d}' \
		-e '/^<!-- leaderboard -->$$/r results/reference/quick/tables/leaderboard.md' README.md

test: lint
	$(RUN) pytest -m "not slow"

test-slow: $(READY)
	$(RUN) pytest -m slow

# Ratios within one run, for a quiet machine: half an hour on a CPU with AMX, two hours in float32.
benchmark: $(READY)
	$(RUN) pip install --quiet -c requirements.lock -e '.[benchmark]'
	$(RUN) pytest -o addopts= tests/benchmarks --benchmark-only --benchmark-json results/benchmarks.json

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy bench baselines
	$(RUN) snakefmt --check Snakefile bench/rules baselines
	$(SNAKEMAKE) --lint

lock: $(READY)
	$(RUN) (grep '^#' requirements.lock; pip freeze --exclude-editable | sed -n '/==/s/+.*//;/==/p') > .lock.new
	mv .lock.new requirements.lock

# torch comes first and by name: a resolver that meets it as a dependency may take another build.
$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(RUN) pip install --quiet -c requirements.lock torch torchvision
	$(RUN) pip install --quiet -c requirements.lock -e '.[dev]'
	touch $@
