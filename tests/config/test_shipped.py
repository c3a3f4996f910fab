"""Every option of every group in conf/ composes and passes the check, with some task."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import dynmoe.conf
import pytest
from hydra import compose
from omegaconf import DictConfig

from dynmoe.config import machine
from dynmoe.config.compose import preflight, search_path
from dynmoe.config.options import modality, own

CONF = Path(dynmoe.conf.__file__).parent
TASKS = {
    "image": "task=vit_domainbed",
    "text": "task=glue",
    "text-stream": "task=lm",
    "vision-language": "task=vl",
}

# The task with which a group, or one of its options, is meant to be used.
HOMES = {
    "experiment": "text",
    "experiment=sparse_tuning": "image",
    "moe=dynmoe_glue": "text",
    "moe=dynmoe_vl": "vision-language",
    "moe=dynmoe_vl_official": "vision-language",
    "moe=moe_llava": "vision-language",
    "moe=native": "text",
    "protocol=glue": "text",
    "protocol=glue_heldout": "text",
    "protocol=llava": "vision-language",
    "protocol=lm": "text-stream",
    "schedule=glue_code": "text",
    "schedule=glue_paper": "text",
    "schedule=vl_code": "vision-language",
    "schedule=vl_code_phi2": "vision-language",
    "stage": "vision-language",
    "sweep=glue_small": "text",
    "sweep=ablation": "text-stream",
    "sweep=lm_small": "text-stream",
    "sweep=paper_glue": "text",
    "sweep=vl_small": "vision-language",
}
# Options that do not go together with one of every other group.
APART = {
    "data=questions": ["mode=check"],  # no training data
    "moe=dense": [],  # no schedule
    "moe=native": ["backbone.architecture=olmoe"],
    "mixing=fixed": ["mixing.weights=[1,2]"],
    "mixing=ref_loss": ["mixing.reference=[1,2]"],
    "stage=align": ["moe=dense"],
    "stage=instruct": ["moe=dense"],
}


def shipped() -> list[str]:
    files = (file for file in sorted(CONF.glob("*/*.yaml")) if not file.name.startswith("_"))
    return [f"{file.parent.name}={file.stem}" for file in files if file.parent.name != "local"]


def home(option: str) -> str:
    """The modality of an option's task; data and backbones say it themselves."""
    group, name = option.split("=")
    kind = modality(own(group, name)) if group in ("data", "backbone") else None
    return kind or HOMES.get(option) or HOMES.get(group) or "image"


def commands() -> list[list[str]]:
    """Commands with one option of as many groups as go together; a sweep takes one of its own."""
    found = []
    with search_path():
        options = [option for option in shipped() if not option.startswith("task=")]
        homes = {option: home(option) for option in options}
    for kind, task in TASKS.items():
        groups: dict[str, list[str]] = {}
        for option in options:
            if homes[option] != kind:
                continue
            if option.startswith(("sweep=", "experiment=", "schedule=")) or option in APART:
                found.append([TASKS[kind], option, *APART.get(option, [])])
            else:
                groups.setdefault(option.split("=")[0], []).append(option)
        found += [[task, *filter(None, row)] for row in zip_longest(*groups.values())]
    return found


def rows() -> list[Any]:
    """The commands; a sweep over twenty mixtures composes each of them."""
    large = {f"sweep={name}" for name in ("routers", "ablation", "frontier", "frontier_routers")}
    return [
        pytest.param(each, marks=pytest.mark.slow) if large & {*each} else each
        for each in commands()
    ]


@pytest.mark.parametrize("command", rows(), ids=" ".join)
def test_options(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "of this machine")
    monkeypatch.setattr(machine, "DEVICES", ("null",))  # a GPU's driver
    found = preflight(command).problems
    if any(text.startswith("data.root: required") for text in found):
        found = preflight([*command, f"data.root={tmp_path}"]).problems
    assert found == []


# The keys of each task's default configuration, by node; the root
# has no name. A new key is a decision: it is added here as well.
COMMON = """
: backbone data hparams_seed logger mode moe name overwrite paths protocol runtime seed task
: trainer trial_seed
backbone: _target_ grad_checkpointing model options pretrained
data: _target_ batch_size eval_batch_size name
logger: csv tensorboard
moe: adaptation algorithm aux_weight backend conflict expert_dropout init layers max_experts name
moe: num_experts recompute router shared_experts
paths: cache outputs
protocol: holdout_fraction name
runtime: fused_attention malloc matmul_precision progress_every
task: async_save eval_every module name on_nonfinite optimizer placement routing_every selection
task: steps
trainer: _target_ accelerator accumulate_grad_batches devices enable_model_summary
trainer: enable_progress_bar gradient_clip_val log_every_n_steps max_epochs max_steps
trainer: num_sanity_val_steps precision strategy use_distributed_sampler val_check_interval
"""
KEYS = {
    "image": """
backbone: adapter drop_path head image_size token_sparsify
data: augment_eval class_balanced environments holdout_fraction image_size linear_baseline
data: test_envs trial_seed workers
protocol: augment_eval datasets defaults
""",
    "text": """
backbone: architecture head lora path
data: cache holdout_fraction linear_baseline max_length ood ood_root root skip_invalid source task
data: tokenizer_name tokenizer_path trial_seed
protocol: datasets defaults patience searched selection
task: epochs patience scheduler
""",
    "text-stream": """
backbone: architecture lora path
data: cache examples length tokenizer_name tokenizer_path trial_seed vocabulary
protocol: datasets defaults patience scratch searched selection
task: epochs patience save_every scheduler
""",
    "vision-language": """
: plan stage
backbone: architecture image_placement path projector template vision
data: cache content examples fit image_size max_length max_new_tokens mean
data: patch_size question_sets question_template skip_invalid std template tokenizer_name
data: tokenizer_path verify workers
plan: conversations mean_k mean_tokens tflops utilisation
protocol: selection stages
stage: after name start suffix template
task: epochs save_every scheduler
""",
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_new_key_is_a_decision(kind: str) -> None:
    expected: dict[str, set[str]] = {}
    for line in (COMMON + KEYS[kind]).strip().splitlines():
        if line:
            node, _, keys = line.partition(":")
            expected.setdefault(node, set()).update(keys.split())
    with search_path():
        cfg = compose("config", [TASKS[kind]])
    found = {str(key): set(node) for key, node in cfg.items() if isinstance(node, DictConfig)}
    assert {"": set(cfg), **found} == expected
