# `make help` lists the targets. All of them use .venv, which the first one makes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/dynmoe-run
DATA   ?= data
# PyTorch's own builds instead of PyPI's: TORCH=cpu has no CUDA (2 GB instead of 6), TORCH=cu126 an older one.
TORCH  ?=

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
# Of pip's hundreds of lines those that take time: large downloads, building, installing.
PIP    := $(BIN)/python -m pip --disable-pip-version-check install
SHOW   := awk '/^ *(Downloading|Using cached) .*[MG]B\)$$|^ *Building|^Installing|^Successfully/ { print; fflush() }'

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo demo-language demo-vl test test-all torture lint bench bench-gpu smoke frontier frontier-routers frontier-text frontier-images ablation \
	reproduce-vision reproduce-vision-small \
	reproduce-language reproduce-language-small reproduce-vl reproduce-vl-small clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-24s %s\n", $$1, $$2}'

$(BIN)/dynmoe-run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("dynmoe needs Python >= 3.11, found %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@$(PIP) --quiet --upgrade pip
	@echo 'Installing PyTorch, dynmoe and what its runs need: some minutes'
	@$(if $(TORCH),$(PIP) torch torchvision --index-url https://download.pytorch.org/whl/$(TORCH) | $(SHOW))
	@$(PIP) --editable '.[joblib,vision-language]' | $(SHOW)
	@touch $@

$(BIN)/pytest: $(BIN)/dynmoe-run
	@echo 'Installing what tests and lint need'
	@$(PIP) --editable '.[dev]' | $(SHOW)
	@touch $@

install: $(BIN)/dynmoe-run  ## Make .venv and install dynmoe into it (about 6 GB with PyTorch and CUDA; TORCH=cpu: 2 GB)

install-dev: $(BIN)/pytest  ## Add what tests and lint need

demo: install  ## Train DynMoE on rotated digits: 2 to 3 minutes on 2 CPU cores
	$(RUN) task=vit_domainbed

demo-language: install  ## Train DynMoE on WordNet's glosses: 1 to 2 minutes on 2 CPU cores
	$(RUN) task=glue

demo-vl: install  ## Train a small LLaVA with DynMoE on rendered scenes, all three stages: about 5 minutes on 2 CPU cores
	$(RUN) task=vl

test: install-dev  ## Run the tests (about 3 minutes on 2 idle CPU cores)
	$(BIN)/python -m pytest -m 'not slow' --numprocesses auto --dist loadfile

test-all: install-dev lint  ## Run lint and all tests, as CI does
	$(BIN)/python -m pytest

ROUNDS ?= 20
SEED   ?= 0
torture: install-dev  ## Kill, damage and race tiny runs, ROUNDS times by SEED, and print counts (docs/faults.md)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/torture/torture.py --rounds $(ROUNDS) --seed $(SEED) $(TORTURE)

lint: install-dev  ## Check format, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## Time the MoE layer and a training step on this machine: about 5 minutes on 2 CPU cores
	$(BIN)/dynmoe-bench layer --shape a b --k 1.5 --rounds 7
	$(BIN)/dynmoe-bench step --k 1.5 --rounds 7

bench-gpu: install  ## Check and time bf16 experts and a ViT-S step on this GPU: less than 8 minutes
	$(BIN)/dynmoe-bench gpu

smoke: install  ## Run a small sweep on digits, its timing and its report: 1 to 2 minutes on 2 CPU cores
	$(RUN) sweep=smoke task=vit_domainbed hydra/launcher=joblib
	$(BIN)/dynmoe-bench step --runs outputs/vit_domainbed_smoke --rounds 3
	$(BIN)/dynmoe-report outputs/vit_domainbed_smoke

# Quality over cost (docs/reports/frontier). A dense model is trained once; all settings go on from it, so that seeds differ
# by little. The first learning rate is the better of two for the dense model, the second was not searched.
SEEDS  ?= 0,1,2
START  := outputs/frontier_start
GOES_ON = backbone.path=$< backbone.architecture=null backbone.pretrained=true seed=$(SEEDS) hydra/launcher=joblib
MICRO  := task=lm backbone=lm_micro trainer.gradient_clip_val=1.0
LONGER  = $(MICRO) $(GOES_ON) task.steps=100 task.eval_every=25 task.optimizer.lr=2e-3
TOPICS := task=glue protocol=glue_heldout
# Without a learning rate that falls to 0 the last step's noise hides every difference.
IMAGES := task=vit_domainbed data=image_folder data.test_envs=[b_test] data.batch_size=64 protocol.augment_eval=false \
	backbone=vit_digits backbone.drop_path=0 'backbone.options={patch_size: 7, embed_dim: 32, depth: 4, num_heads: 4}' \
	'+task.scheduler={_target_: dynmoe.tasks.cosine_with_warmup, _partial_: true, warmup: 0.05}'

$(START)/glosses: | $(BIN)/dynmoe-run
	$(RUN) $(MICRO) data.vocabulary=1024 moe=dense seed=100 task.steps=400 task.optimizer.lr=4e-3 name=frontier_start
	$(BIN)/dynmoe-convert run=$$(ls -dt $(START)/glosstexts_dense_* | head -n 1) to=$@ overwrite=true

$(START)/topics: | $(BIN)/dynmoe-run
	$(RUN) $(TOPICS) moe=dense seed=100 task.steps=250 task.eval_every=125 name=frontier_start
	$(BIN)/dynmoe-convert run=$$(ls -dt $(START)/glosses_dense_* | head -n 1) to=$@ overwrite=true

$(START)/images.ckpt: | $(BIN)/dynmoe-run
	$(RUN) $(IMAGES) data.root=$(DATA)/first moe=dense seed=100 task.steps=2501 task.eval_every=1250 task.optimizer.lr=2e-3 name=frontier_start
	cp $$(ls -dt $(START)/imagefolder_dense_* | head -n 1)/checkpoints/last.ckpt $@

frontier: $(START)/glosses  ## Quality over cost on WordNet's definitions, with its report: 19 settings, 3 seeds, less than 30 minutes on 2 CPU cores
	$(RUN) sweep=frontier $(LONGER) name=frontier_glosses
	$(BIN)/dynmoe-bench step --runs outputs/frontier_glosses
	$(BIN)/dynmoe-report outputs/frontier_glosses

frontier-routers: $(START)/glosses  ## The other routers beside them, after make frontier: 38 settings
	$(RUN) sweep=frontier_routers $(LONGER) name=frontier_glosses
	$(BIN)/dynmoe-report outputs/frontier_glosses

frontier-text: $(START)/topics  ## The same settings on text classification
	$(RUN) sweep=frontier $(TOPICS) $(GOES_ON) backbone.head=keep task.steps=150 task.eval_every=50 task.optimizer.lr=5e-4 name=frontier_topics
	$(BIN)/dynmoe-report --by-loss outputs/frontier_topics

frontier-images: $(START)/images.ckpt  ## The same settings on images: DATA=folder of Fashion-MNIST as docs/reports/frontier makes it
	$(RUN) sweep=frontier $(IMAGES) data.root=$(DATA)/second backbone.pretrained=$< backbone.head=keep seed=$(SEEDS) hydra/launcher=joblib \
	  task.steps=301 task.eval_every=300 task.optimizer.lr=1e-3 name=frontier_images
	$(BIN)/dynmoe-report --by-loss outputs/frontier_images

ablation: $(START)/glosses  ## DynMoE-plus with one part changed at a time (docs/method.md): 21 settings
	$(RUN) sweep=ablation $(LONGER) name=ablation_glosses
	$(BIN)/dynmoe-report outputs/ablation_glosses

# The paper's vision table (DynMoE, arXiv 2405.14297, Table 1): every environment is held out once. DATA holds
# PACS/, VLCS/, office_home/, domain_net/. One run of 5001 steps (DomainNet: 15001) of DeiT-S/16 at 224 px
# takes hours on one GPU and weeks on a CPU; 3 methods x 3 seeds x (4 + 4 + 4 + 6 environments) = 162 runs.
VISION := sweep=paper_vision task=vit_domainbed protocol=gmoe backbone=vit_small trainer=gpu data.root=$(DATA)
reproduce-vision: install  ## The paper's PACS, VLCS, OfficeHome and DomainNet runs and their report: DATA=folder, days on a GPU
	for set in pacs vlcs office_home; do $(RUN) $(VISION) data=$$set name=vision_$$set || exit 1; done
	$(RUN) $(VISION) data=domainnet 'data.test_envs=[0],[1],[2],[3],[4],[5]' name=vision_domainnet
	$(BIN)/dynmoe-report outputs/vision_pacs outputs/vision_vlcs outputs/vision_office_home outputs/vision_domainnet --out outputs/vision_report

reproduce-vision-small: install  ## The report in docs/reports/rotated_digits: 30 runs, about 20 minutes on 2 CPU cores
	$(RUN) sweep=topk_grid task=vit_domainbed name=rotated_digits hydra/launcher=joblib
	$(BIN)/dynmoe-bench step --runs outputs/rotated_digits
	$(BIN)/dynmoe-report outputs/rotated_digits

# The paper's GLUE table (Figure 2): dense BERT-large, 8 grid settings, DynMoE; 3 learning rates x 3 seeds. DATA holds
# CoLA/, MRPC/, QNLI/, MNLI/, RTE/ as official TSV files. 5 x 90 runs.
reproduce-language: install  ## The paper's GLUE runs with BERT-large and their report: DATA=folder, days on a GPU
	for set in cola mrpc qnli mnli rte; do \
	  $(RUN) sweep=paper_glue task=glue data=$$set data.source=tsv data.root=$(DATA) trainer=gpu name=glue_$$set || exit 1; done
	$(BIN)/dynmoe-report outputs/glue_cola outputs/glue_mrpc outputs/glue_qnli outputs/glue_mnli outputs/glue_rte --out outputs/glue_report

MODEL ?= minilm
SMALL := sweep=glue_small task=glue data.source=tsv data.root=$(DATA) backbone=minilm backbone.path=$(MODEL)
reproduce-language-small: install  ## The report in docs/reports/glue_small: DATA=folder of GLUE, MODEL=folder of MiniLM; hours on 2 CPU cores
	for set in rte cola; do $(RUN) $(SMALL) data=$$set name=glue_small_$$set hydra/launcher=joblib || exit 1; done
	for set in rte cola; do $(BIN)/dynmoe-bench step --runs outputs/glue_small_$$set || exit 1; done
	$(BIN)/dynmoe-report outputs/glue_small_rte outputs/glue_small_cola --out outputs/glue_small

# DynMoE-LLaVA and MoE-LLaVA (StableLM-2-1.6B, Qwen-1.8B, Phi-2): stages I and II once for each language model, then
# stage III dense, with top-2 of 4 and with DynMoE. DATA holds MoE-LLaVA's ft_json/, pt_json/ and images; QUESTIONS
# gqa/, scienceqa/, textvqa/, pope/, mme/. Stages run one by one: on several devices a run waits for no other.
QUESTIONS ?= $(DATA)/eval
SETS := 'data.question_sets={gqa: $(QUESTIONS)/gqa, scienceqa: $(QUESTIONS)/scienceqa, textvqa: $(QUESTIONS)/textvqa, pope: $(QUESTIONS)/pope, mme: $(QUESTIONS)/mme}'
VL = task=vl data=llava data.root=$(DATA) backbone=vl_$(1) trainer=ddp trainer.precision=bf16-mixed trainer.devices=8 $(SETS)
reproduce-vl: install  ## The paper's three vision-language models, all stages, and their report: DATA=, QUESTIONS=, weeks on 8 GPUs
	for lm in stablelm qwen phi2; do for stage in align instruct; do \
	  $(RUN) $(call VL,$$lm) stage=$$stage || exit 1; done; \
	  for moe in dense moe_llava dynmoe_vl; do $(RUN) $(call VL,$$lm) moe=$$moe name=vl_$$lm || exit 1; done; done
	$(BIN)/dynmoe-report outputs/vl_stablelm outputs/vl_qwen outputs/vl_phi2 --out outputs/vl_report

reproduce-vl-small: install  ## The reports in docs/reports/vl_scenes and vl_easy_vqa: hours on 2 CPU cores
	for set in scenes easy_vqa; do $(RUN) sweep=vl_small task=vl data=$$set name=vl_$$set hydra/launcher=joblib || exit 1; \
	  $(BIN)/dynmoe-bench generate --runs outputs/vl_$$set || exit 1; \
	  $(BIN)/dynmoe-report outputs/vl_$$set || exit 1; done

clean:  ## Remove .venv and caches, not outputs
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
