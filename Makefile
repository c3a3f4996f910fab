# `make help` lists the targets. All of them use .venv, which the first one makes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/dynmoe-run
DATA   ?= data
SEEDS  ?= 0,1,2

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint bench reproduce-vision reproduce-vision-small clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-24s %s\n", $$1, $$2}'

$(BIN)/dynmoe-run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("dynmoe needs Python >= 3.11, found %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

install: $(BIN)/dynmoe-run  ## Make .venv and install dynmoe into it (about 6 GB with PyTorch)

demo: install  ## Train DynMoE on rotated digits: 2 to 3 minutes on 2 CPU cores
	$(RUN) task=vit_domainbed

test: install  ## Run the tests (under 5 minutes on 2 CPU cores)
	$(BIN)/python -m pytest -m 'not slow'

test-all: install lint  ## What CI runs: checks, and all tests
	$(BIN)/python -m pytest

lint: install  ## Format, lint and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## How fast the MoE layer and a training step are on this machine: about 5 minutes on 2 CPU cores
	$(BIN)/dynmoe-bench layer --shape a b --k 1.5 --rounds 7
	$(BIN)/dynmoe-bench step --k 1.5 --rounds 7

# The paper's vision table (DynMoE, arXiv 2405.14297, Table 1): every environment left out in turn. DATA holds
# PACS/, VLCS/, office_home/, domain_net/. One run of 5001 steps (DomainNet: 15001) of DeiT-S/16 at 224 px
# takes hours on one GPU and weeks on a CPU; 3 methods x 3 seeds x (4 + 4 + 4 + 6 environments) = 162 runs.
reproduce-vision: install  ## The paper's PACS, VLCS, OfficeHome and DomainNet runs: DATA=folder, days on a GPU
	for set in pacs vlcs office_home; do \
	  $(RUN) -m task=vit_domainbed protocol=gmoe data=$$set data.root=$(DATA) backbone=vit_small trainer=gpu \
	    moe=dynmoe,gmoe,dense 'data.test_envs=[0],[1],[2],[3]' seed=$(SEEDS) name=vision || exit 1; done
	$(RUN) -m task=vit_domainbed protocol=gmoe data=domainnet data.root=$(DATA) backbone=vit_small trainer=gpu \
	  moe=dynmoe,gmoe,dense 'data.test_envs=[0],[1],[2],[3],[4],[5]' seed=$(SEEDS) name=vision

reproduce-vision-small: install  ## Its small twin on rotated digits: 3 methods, 1 environment, about 8 minutes
	$(RUN) -m task=vit_domainbed protocol=gmoe moe=dynmoe,gmoe,dense name=vision_small

clean:  ## Remove .venv and caches (not outputs)
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
