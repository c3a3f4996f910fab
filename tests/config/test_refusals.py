"""Commands as people mistype them: each ends at once, with the key or word and the fix."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import command
from omegaconf import DictConfig, OmegaConf

from dynmoe.config import environments, machine, models, ranges
from dynmoe.config.arguments import joined
from dynmoe.config.compose import preflight
from dynmoe.data.images import digits

IMAGES, TEXTS, VL = "task=vit_domainbed", "task=glue", "task=vl"
OLMOE = f"{TEXTS} backbone.architecture=olmoe +backbone.options.num_experts=16"

# A command, and what its message says: the key or word, then what was expected or the fix.
TABLE = {
    # words of the command line
    "task = vit_domainbed": ("task = vit_domainbed:", "task=vit_domainbed"),
    "task= vit_domainbed": ("task= vit_domainbed:", "task=vit_domainbed"),
    f"{IMAGES} --lr 1e-3": ("--lr 1e-3: no such option", "lr=1e-3", "task.optimizer.lr"),
    f"--seed=3 {IMAGES}": ("--seed=3: no such option", "seed=3"),
    f"{IMAGES} --overwrite": ("--overwrite: no such option", "--help"),
    f"{IMAGES} data.test_envs=[0, 1]": ("Quote it: 'data.test_envs=[0, 1]'",),
    f"{IMAGES} topk": ("topk: expected key=value", "moe=topk"),
    f"{IMAGES} =3": ("=3: expected key=value",),
    f"{IMAGES} name=é": ("name=é:", "'name=\"é\"'"),
    # keys that live elsewhere
    f"{IMAGES} lr=1e-3": ("lr: unknown key", "task.optimizer.lr"),
    f"{TEXTS} epochs=3": ("epochs: unknown key", "task.epochs"),
    f"{IMAGES} batch_size=8": ("batch_size: unknown key", "data.batch_size"),
    f"{IMAGES} task.module.aux_wieght=1": ("task.module.aux_wieght", "'aux_weight'"),
    # both ends of ranges
    f"{IMAGES} seed=10000000000": ("seed:", "from 0 to 4294967295"),
    f"{IMAGES} trial_seed=-1": ("trial_seed:", "from 0 to 4294967295"),
    f"{IMAGES} task.optimizer.lr=-1": ("task.optimizer.lr: expected 0 or more",),
    f"{IMAGES} task.optimizer.lr=nan": ("task.optimizer.lr: expected a finite number",),
    f"{IMAGES} moe.aux_weight=inf": ("moe.aux_weight: expected a finite number",),
    f"{IMAGES} data.cache_gb=-inf data=pacs data.root=.": ("data.cache_gb: expected a finite",),
    f"{IMAGES} task.steps=99999999999999999999": (
        "task.steps: expected at most 9223372036854775807",
    ),
    f"{IMAGES} moe.expert_dropout=2": ("moe.expert_dropout: expected 0 or more, below 1",),
    f"{IMAGES} backbone.token_sparsify={{keep:1.5}}": (
        "backbone.token_sparsify.keep: expected a share above 0, up to 1",
    ),
    f"{IMAGES} backbone.token_sparsify={{blocks:[1,9]}}": (
        "backbone.token_sparsify.blocks: there is no block 9",
        "0 to 5",
    ),
    f"{IMAGES} backbone.token_sparsify={{kep:0.5}}": ("token_sparsify.kep: unknown", "'keep'"),
    f"{IMAGES} backbone.token_sparsify={{keep:[0.5],blocks:[1,2]}}": (
        "backbone.token_sparsify.keep: expected one share, or 2",
    ),
    f"{IMAGES} backbone.adapter={{link_embeddings:true,links:false}}": (
        "backbone.adapter.link_embeddings:",
        "backbone.adapter.links=true",
    ),
    f"{IMAGES} backbone.adapter={{dim:0}}": ("backbone.adapter.dim: expected 1 or more",),
    f"{IMAGES} backbone.drop_path=-0.1": ("backbone.drop_path: expected 0 or more, below 1",),
    f"{IMAGES} +task.optimizer.betas=[0.9,1.5]": ("task.optimizer.betas.1: expected 0 or more",),
    f"{IMAGES} trainer.accumulate_grad_batches=-1": ("accumulate_grad_batches: expected 1 or",),
    f"{IMAGES} trainer.accumulate_grad_batches=0": ("accumulate_grad_batches: expected 1 or",),
    f"{TEXTS} backbone.options.intermediate_size=0": ("options.intermediate_size: expected 1",),
    f"{VL} task.scheduler.warmup=1.5": ("task.scheduler.warmup: expected a share from 0 to 1",),
    f"{VL} backbone.vision.layer=0": ("backbone.vision.layer: expected -1 or less",),
    f"{VL} plan.utilisation=0": ("plan.utilisation: expected a share above 0",),
    # windows of the adaptation
    f"{IMAGES} moe.adaptation.length=2.5 moe.adaptation.period=5": (
        "moe.adaptation: expected whole steps",
    ),
    f"{IMAGES} moe.adaptation.period=5": ("moe.adaptation: expected start >= 0 and 0 < length",),
    f"{IMAGES} moe=mass moe.adaptation.window=2": (
        "moe.adaptation: expected shares of the training",
        "unit='step'",
    ),
    f"{IMAGES} moe=mass moe.adaptation.unit=step": ("moe.adaptation: expected whole steps",),
    f"{IMAGES} moe=mass moe.adaptation.p_value=2": ("moe.adaptation.p_value: expected a share",),
    f"{IMAGES} moe=mass moe.adaptation.split=both": (
        "moe.adaptation.split: expected 'projection_full' or 'projection_both'",
    ),
    f"{IMAGES} moe=mass schedule=paper_steps": (
        "moe.adaptation.period: unknown key",
        "schedule=...",
        "moe.adaptation.until",
    ),
    f"{IMAGES} moe=mass moe.max_experts=8": ("moe: max_experts (8)", "Raise moe.max_experts"),
    f"{IMAGES} moe=mass trainer=fsdp": ("trainer.strategy: growth by drift", "trainer=ddp"),
    f"{IMAGES} moe=mass trainer=fsdp2": ("trainer.strategy: growth by drift", "trainer=ddp"),
    f"{IMAGES} trainer=fsdp trainer.strategy.state_dict_type=sharded": (
        "trainer.strategy.state_dict_type: expected full",
    ),
    f"{IMAGES} trainer=fsdp trainer.gradient_clip_val=1": (
        "trainer.gradient_clip_val: trainer=fsdp cannot",
        "trainer=fsdp2",
    ),
    f"{IMAGES} trainer=fsdp2 trainer.gradient_clip_val=1 +trainer.gradient_clip_algorithm=value": (
        "trainer.gradient_clip_algorithm: expected norm",
    ),
    f"{IMAGES} trainer=fsdp2 "
    "+trainer.callbacks._target_=lightning.pytorch.callbacks.EMAWeightAveraging": (
        "trainer.callbacks: EMAWeightAveraging averages whole weights",
        "trainer=ddp",
    ),
    f"{IMAGES} moe=mass trainer=expert_parallel": ("trainer.strategy: growth by drift",),
    f"{IMAGES} moe=dense trainer=expert_parallel": (
        "trainer.strategy: moe=dense has no routed experts",
        "trainer=ddp",
    ),
    f"{IMAGES} trainer=expert_parallel trainer.devices=2 trainer.precision=16-mixed": (
        "trainer.precision: each device would decide",
    ),
    f"{IMAGES} moe=emoe trainer=expert_parallel moe.conflict.weight=0.1": (
        "trainer.strategy: the router of moe=emoe reads",
        "moe.conflict.weight=0",
    ),
    f"{IMAGES} +trainer.plugins._target_=lightning.pytorch.plugins.AsyncCheckpointIO": (
        "trainer.plugins: AsyncCheckpointIO",
        "task.async_save=true",
    ),
    f"{IMAGES} task.async_save=true "
    "+trainer.plugins=[{_target_:lightning.pytorch.plugins.TorchCheckpointIO}]": (
        "task.async_save: trainer.plugins has a writer",
        "task.async_save=false",
    ),
    f"{IMAGES} task.async_save=soon": ("task.async_save", "true"),
    f"{IMAGES} trainer=expert_parallel trainer.devices=4 trainer.strategy.size=3": (
        "trainer.strategy.size: expected a divisor of the 4 devices",
        "size=null",
    ),
    f"{IMAGES} seed=99999999999999999999": ("seed: expected from 0 to 4294967295",),
    f"{IMAGES} runtime.progress_every=-1": ("runtime.progress_every: expected 0 or more",),
    f"{IMAGES} data=image_folder data.root=/ data.eval_images=0": (
        "data.eval_images: expected 1 or more",
    ),
    f"{VL} mode=plan plan.mean_k=99 stage=moe": ("plan.mean_k: expected at most moe.max_experts",),
    # texts and questions of images
    f"{VL} stage=moe backbone.template=foo": ("backbone.template: expected one of plain, simple",),
    f"{VL} stage=moe data.question_sets={{gqq:/tmp}}": ("data.question_sets.gqq:", "'gqa'"),
    f"{VL} stage=moe data.question_sets={{gqa:/none}}": ("gqa: no folder '/none'",),
    f"{VL} stage=moe data.question_sets=[gqa]": ("'data.question_sets={gqa: /folder}'",),
    f"{VL} stage=moe task.module.trains=[]": ("task.module.trains: expected some of vision",),
    # types below targets, elements of lists
    f"{TEXTS} task.scheduler.name=false": ("task.scheduler.name: expected a string",),
    f"{IMAGES} task.module.aux_weight={{a:1}}": ("task.module.aux_weight: expected a number",),
    f"{IMAGES} data.environments._partial_=null": ("data.environments._partial_: expected true",),
    f"{IMAGES} data.environments=null": ("data.environments: expected an object with a _target_",),
    f"{IMAGES} ~data.environments.seed": ("data.environments.seed: missing",),
    f"{IMAGES} ~task.optimizer._target_": ("task.optimizer._target_: missing",),
    f"{IMAGES} trainer._partial_=true": ("trainer._partial_: expected false",),
    f"{IMAGES} logger.csv=null": ("logger.csv: expected an object with a _target_",),
    f"{IMAGES} data.batch_size={{_target_:os.getcwd}}": ("data.batch_size: expected an integer",),
    f"{VL} data.mean=[a,0.5,0.5]": ("data.mean.0: expected a number, found 'a'",),
    f"{VL} data.mean=[0.5,0.5]": ("data.mean: expected a list of 3",),
    f"{IMAGES} data.test_envs=[sketch]": (
        "data.test_envs: there is no environment sketch",
        "0 (0), 1 (15)",
    ),
    f"{TEXTS} backbone.options={{0:1}}": ("backbone.options.0: expected text as a key",),
    f"{TEXTS} task.epochs=0.5": ("task.epochs: expected an integer or null, found 0.5",),
    f"{VL} protocol.stages.moe=abc": ("protocol.stages.moe: expected a mapping",),
    # models, patches, environments
    f"{IMAGES} backbone.model=vit_smal_patch16_224": ("backbone.model:", "vit_small_patch16_224"),
    f"{IMAGES} backbone.model=resnet50": ("backbone.model: a Vision Transformer is needed",),
    f"{IMAGES} backbone=vit_small backbone.image_size=100": ("image_size: 100", "96 or 112"),
    f"{IMAGES} data.image_size=32": ("data.image_size: expected backbone.image_size (28)",),
    f"{VL} data.patch_size=4": ("data.patch_size: expected backbone.vision.patch_size (8)",),
    f"{IMAGES} data.test_envs=[9]": ("data.test_envs: there is no environment 9", "5 (75)"),
    f"{IMAGES} data=pacs data.root=. data.test_envs=[4]": (
        "data.test_envs: there is no environment 4",
    ),
    f"{VL} backbone.architecture=dory": ("backbone.architecture:", "'dory'", "moe=dense"),
    f"{TEXTS} backbone.architecture=albert": ("'albert' models: its blocks share", "moe=dense"),
    f"{TEXTS} backbone.architecture=granite": ("backbone.architecture: ", "no text classifier"),
    f"{VL} backbone.architecture=lama": ("backbone.architecture:", "'llama'"),
    # models that are mixtures already
    f"{TEXTS} moe=native": ("moe: native is for", "olmoe", "found 'bert'", "moe=dynmoe"),
    f"{IMAGES} moe=native": ("moe: native is for", "found 'timm'"),
    f"{TEXTS} moe=topk moe.init=keep": ("moe.init: keep is for", "found 'bert'", "init=auto"),
    f"{OLMOE} moe=emoe": ("moe.init: cluster makes experts of one FFN", "moe.init=keep"),
    f"{OLMOE} moe=dynmoe moe.init=copy": ("moe.init: copy makes", "'olmoe'", "moe.init=keep"),
    f"{OLMOE} moe=topk moe.num_experts=4": ("moe.num_experts: expected 16", "Leave it out"),
    f"{OLMOE} moe=dynmoe moe.max_experts=8": ("num_experts (16) > max_experts (8)",),
    f"{OLMOE} moe=native +backbone.options.output_router_logits=true": (
        "output_router_logits: expected false",
        "moe.aux_weight",
    ),
    f"{TEXTS} backbone.architecture=phimoe moe=native": ("moe: native", "SparseMixer", "moe=topk"),
    f"{TEXTS} backbone.architecture=deepseek_v3 moe=native": ("moe: native", "sigmoid", "bias"),
    f"{TEXTS} backbone.architecture=mixtral moe=native +backbone.options.router_jitter_noise=0.1": (
        "backbone.options.router_jitter_noise: expected 0",
        "found 0.1",
    ),
    f"{TEXTS} backbone.architecture=gpt_oss": ("backbone.architecture:", "biases", "moe=dense"),
    # earlier stages
    f"{VL} protocol.stages.align.datasets.Scenes.trains=[all]": (
        "stage align: task.module.trains",
    ),
    # this machine
    f"{IMAGES} logger=wandb": ("logger.wandb: no key", "wandb login", "logger.wandb.offline=true"),
    f"{IMAGES} paths.outputs=/proc/x": ("paths.outputs: '/proc' cannot be written to",),
    f"{IMAGES} hydra.run.dir=/proc/x": ("hydra.run.dir: '/proc' cannot be written to",),
    f"{IMAGES} name={'x' * 300}": ("name: longer than the 255 bytes",),
    f"{IMAGES} paths.outputs=''": ("paths.outputs: expected the name of a folder",),
    # deletions, and Hydra's own keys
    f"{IMAGES} ~trainer.precision=64": ("~trainer.precision: takes no value",),
    f"{IMAGES} ~trainer.gradient_clip_val": ("~trainer.gradient_clip_val: it is null already",),
    f"{IMAGES} ~trainer.use_distributed_sampler": ("trainer.use_distributed_sampler: missing",),
    f"{IMAGES} data=0": ("data: no option '0'",),
    f"{IMAGES} hydra.verbose=???": ("hydra.verbose: expected a value",),
    f"{IMAGES} hydra/launcher=1": ("hydra/launcher: expected the name of an option",),
    # sweeps
    f"{IMAGES} sweep=glue_small": ("sweep=glue_small is for task=glue, found task=vit_domainbed",),
    f"-m {IMAGES} seed=range(5,2)": ("seed=range(5,2): has no value",),
    f"-m {IMAGES} seed=range(0,5,0)": ("seed=range(0,5,0): has no value",),
    f"{IMAGES} sweep=optuna moe.num_experts=range(6,18,6)": (
        "(18) > max_experts",
        "end of a range",
    ),
    f"{IMAGES} sweep=optuna moe.num_experts=interval(2,8)": ("an integer", "int(interval(2,8))"),
    f"{IMAGES} sweep=optuna hydra.sweeper.direction=minimize": ("direction: expected maximize",),
    f"{IMAGES} sweep=optuna hydra.sweeper.n_trials=0": ("n_trials: expected 1 or more",),
}


def never(cfg: DictConfig) -> None:
    raise AssertionError("a wrong command was run")


def words(line: str) -> list[str]:
    """As a shell splits it; quotes of values stay."""
    return shlex.split(line) if "=''" not in line else line.split()


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("line", TABLE)
@pytest.mark.usefixtures("no_account")
def test_the_message_of(line: str, tmp_path: Path) -> None:
    if "sweep=optuna" in line:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done = command(never, tmp_path, *words(line))
    assert done.returncode == 2
    for text in TABLE[line]:
        assert text in done.stderr
    assert len(done.stderr.splitlines()) <= 4 and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["task = x", f"{IMAGES} --lr 1e-3", f"{IMAGES} data.test_envs=[9]"]
)
def test_in_a_process_of_its_own_no_torch_is_loaded(line: str, tmp_path: Path) -> None:
    code = (
        "import sys; from runners.run import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'timm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words(line)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert "Traceback" not in done.stderr


# Files of the user in --config-dir, and what is said about them.
GLOBAL = "# @package _global_\n"
MULTIRUN = GLOBAL + "hydra: {mode: MULTIRUN, sweeper: "
FILES = {
    ("experiment", GLOBAL + "task: {optimzer: {lr: 1}}"): ("task.optimzer", "'optimizer'"),
    ("experiment", "task: {optimizer: {lr: 1}}"): ("experiment:", "# @package _global_"),
    ("experiment", GLOBAL + "seed: [1"): ("own.yaml", "line 2"),
    ("experiment", GLOBAL + "seed: 1\nseed: 2"): ("own.yaml", "duplicate key seed"),
    ("experiment", GLOBAL + "name: \xe9"): ("own.yaml: is not UTF-8",),
    ("experiment", GLOBAL + "defaults: {moe: topk}"): ("experiment/own", "defaults must be a list"),
    ("experiment", GLOBAL + "defaults: [override /moe: dynmo]"): ("'moe/dynmo'", "dynmoe"),
    ("data", "_target_: dynmoe.data.DomainDat"): ("data._target_", "'DomainData'"),
    ("sweep", MULTIRUN + "{parms: {seed: '0,1'}}}"): ("hydra.sweeper.parms", "params"),
    ("sweep", MULTIRUN + "{params: {sed: '0,1'}}}"): ("sed: unknown key", "'seed'"),
    ("sweep", MULTIRUN + "{params: [a]}}"): ("hydra.sweeper.params: expected {key:",),
    ("sweep", MULTIRUN + "{params: {seed: 'range(2,1)'}}}"): ("seed=range(2,1): has no value",),
    ("sweep", MULTIRUN + "{settings: [{moe: 'topk,'}]}}"): ("sweep=own: moe=topk,: cannot be",),
    ("sweep", MULTIRUN + "{settings: [null]}}"): ("hydra.sweeper.settings[0]: expected",),
    ("sweep", MULTIRUN + "{params: {seed: '${nope}'}}}"): ("'nope' not found",),
}


@pytest.mark.parametrize(("group", "text"), FILES)
def test_the_message_about_the_file(group: str, text: str, tmp_path: Path) -> None:
    (tmp_path / group).mkdir()
    (tmp_path / group / "own.yaml").write_bytes(text.encode("latin-1"))
    found = preflight([IMAGES, f"{group}=own"], config_dir=str(tmp_path)).problems
    assert len(found) <= 3
    for words in FILES[group, text]:
        assert any(words in each for each in found), found


def test_options_may_stand_between_overrides(tmp_path: Path) -> None:
    done = command(never, tmp_path, IMAGES, "-m", "seed=range(5,2)")
    assert "has no value" in done.stderr  # read as a sweep, not as an unknown word


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        (["a", "=", "1"], ["a=1"]),
        (["a=", "1", "b=2"], ["a=1", "b=2"]),
        (["a", "=1"], ["a=1"]),
        (["a=[1,", "2]", "b=3"], ["a=[1, 2]", "b=3"]),
    ],
)
def test_spaces_gone_astray(given: list[str], whole: list[str]) -> None:
    text, found = joined(given)
    assert text == whole and len(found) == 1 and whole[0] in found[0]


def test_an_empty_value_is_no_stray_space() -> None:
    assert joined(["data.content.suffix=", "moe=dense"]) == (
        ["data.content.suffix=", "moe=dense"],
        [],
    )


def test_an_account_of_wandb_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert preflight([IMAGES, "logger=wandb"]).problems == []
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert preflight([IMAGES, "logger=wandb"]).problems == []


def test_models_are_known_as_their_libraries_know_them() -> None:
    import timm
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    from dynmoe.backbones.surgery import FORMS, REFUSED

    assert set(timm.list_models()) <= set(models.timm_models())
    assert all(timm.is_model(name) for name in models.timm_models())
    assert models.moe_types() == tuple(FORMS)
    refused = models.moe_refusals()
    assert refused["albert"] == "its blocks share their FFNs" and set(refused.values()) == {
        *REFUSED
    }
    assert {*FORMS, *refused} <= set(models.transformers_types()) and not {*FORMS} & {*refused}
    assert set(CONFIG_MAPPING.keys()) <= set(models.transformers_types())
    classifiers = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert models.text_classifiers() == tuple(classifiers)


def test_environments_of_the_built_in_sets() -> None:
    assert len(environments.ANGLES) == len(digits.ANGLES)
    assert len(environments.COLOURS) == len(digits.COLOR_FLIPS)


def test_a_folder_says_its_type_and_depth(tmp_path: Path) -> None:
    folder = f"backbone.path={tmp_path}"
    config = {"model_type": "llama", "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = (VL, "backbone.architecture=null", "backbone.options={}", folder)
    found = preflight([*base, "~backbone.options.num_hidden_layers", "moe.layers=[3]"]).problems
    assert any("block indices below 3" in text for text in found)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "dory"}))
    assert any("'dory'" in text for text in preflight(base).problems)


def test_every_pattern_is_one_of_a_number() -> None:
    """A key listed twice would have two ranges, the first of which counts."""
    listed = [key for keys in ranges.RANGES.values() for key in keys.split()]
    assert len(set(listed)) == len(listed)
    assert ast.literal_eval("1e400") == float("inf")
    assert ranges.outside("data.std.1", 0.0) == "expected more than 0, found 0.0"
    assert ranges.outside("data.std.1", 0.5) is None
    assert ranges.outside("any.key", True) is None


def test_a_gpu_is_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(machine, "DEVICES", ())
    monkeypatch.setattr("shutil.which", lambda _: None)
    asked = OmegaConf.create({"mode": "train", "trainer": {"accelerator": "gpu"}})
    assert "trainer=cpu" in next(machine.gpu_there(asked))
    cluster = {"hydra": {"launcher": {"_target_": "a.submitit_launcher.SlurmLauncher"}}}
    others = ({"mode": "plan"}, cluster, {"trainer": {"accelerator": "auto"}})
    for other in others:
        assert not [*machine.gpu_there(OmegaConf.merge(asked, other))]
    monkeypatch.setattr(machine, "DEVICES", ("null",))
    assert not [*machine.gpu_there(asked)]
