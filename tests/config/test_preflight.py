"""Every mistake of a command line is found at once, each with its own message."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from hydra import compose

from dynmoe.config.compose import preflight, search_path

TASK = "task=vit_domainbed"


def problems(*overrides: str, **options: object) -> list[str]:
    return preflight(overrides, **options).problems  # type: ignore[arg-type]


def test_a_right_command_has_no_problem() -> None:
    assert problems(TASK) == []
    assert problems(TASK, "data.test_envs.0=1", "moe.layers=[1,3]") == []


def test_three_mistakes_are_three_messages() -> None:
    assert problems(TASK, "moe=topk", "++moe.num_expert=3", "seed=abc", "moe.top_k=9") == [
        "moe.num_expert: unknown key. Did you mean 'num_experts'?",
        "seed: expected an integer, found 'abc'",
        "moe: top_k (9) > num_experts (8): a token cannot choose more experts than exist. "
        "Lower moe.top_k or raise moe.num_experts.",
    ]


def test_an_unknown_key_is_not_its_own_correction() -> None:
    found = ["moe.router.capacity_factor: unknown key."]
    assert problems(TASK, "++moe.router.capacity_factor=1") == found


CAPACITY = "moe.router.min_capacity: 4 needs a moe.router.capacity_factor (1.5)"
WHOLE = "moe.init: copy makes whole experts, moe.router blocks. Set moe.init=random"
NO_LOGITS = "moe.conflict.weight: expected 0 with moe="
SCALED = "trainer.precision: 16-mixed scales gradients"
NO_AUX = "moe.router.z_weight: needs moe.aux_weight above 0"
NOISE = "moe.router.aux: importance_load needs moe.router.noise above 0"
SLOTS = "moe: max_experts (8) != num_experts (4): without moe.adaptation the pool never changes."
CASES = {
    # keys
    "data.seed=1": "data.seed: unknown key. Did you mean 'seed'?",
    "typo=1": "typo: unknown key.",
    "+typo=1": "typo: unknown key.",
    "++trainr.devices=1": "trainr: unknown key. Did you mean 'trainer'?",
    "experimnt=x": "experimnt: unknown key. Did you mean 'experiment'?",
    "++moe.router.lr=1": "moe.router.lr: unknown key. Did you mean task.optimizer.lr",
    "~sed": "~sed: there is no such key to delete. Did you mean 'seed'?",
    "~seed": "seed: missing. Every run configuration has this key",
    "~moe.num_experts": "moe.num_experts: missing. Every moe configuration has this key",
    "+seed=1": "+seed: the key is there already. Leave out the +",
    "data.test_env=[1]": "data.test_env: unknown key. Did you mean 'test_envs'?",
    "trainer.device=2": "trainer.device: unknown key. Did you mean 'devices'?",
    "+protocol.datasets.PACS.lrate=1": "protocol.datasets.PACS.lrate: unknown key.",
    "trainer.max_time=null": (
        "trainer.max_time: not in this configuration. To add it write +trainer.max_time=null"
    ),
    "logger.csv.nam=x": "logger.csv.nam: unknown key. Did you mean 'name'?",
    "a b=c=(": "a b=c=(: cannot be read as key=value.",
    "seed.x=1": "seed: expected an integer, found {'x': 1}",
    "data.test_envs.x=1": "data.test_envs.x: cannot be set: ",
    # types and words
    "mode=chek": "mode: expected 'train' or 'check' or 'plan', found 'chek'",
    "overwrite=1": "overwrite: expected true or false, found 1",
    "task.selection=best": "task.selection: expected 'training_domain_validation' or 'oracle' or",
    "moe.layers=some": "moe.layers: expected 'last_two' or 'every_two' or 'sparse' or ",
    "data.test_envs=0": (
        "data.test_envs: expected a list, found 0. "
        "A list is written 'data.test_envs=[0]', with the quotes"
    ),
    "trainer.precision='31'": "trainer.precision: expected 64 or 32 or 16 or ",
    "moe.adaptation.init=cop": "moe.adaptation.init: expected 'slot' or 'copy_most_used' or",
    # values that are not there
    "data.name=???": "data.name: required, no default: give data.name=VALUE",
    "data.name=${nme}": "data.name: Interpolation key 'nme' not found",
    "task.steps=${recipe:stps}": "protocol domainbed has no 'stps'; it has batch_size, eval_every",
    "data=pacs": "data.root: required, the folder of the data set, e.g. data.root=/data/PACS",
    # targets
    "task.optimizer._target_=torch.optim.Adm": (
        "task.optimizer._target_: torch.optim has no 'Adm'. Did you mean 'Adam'?"
    ),
    "task.optimizer._target_=tensor.Adam": (
        "task.optimizer._target_: no package 'tensor' is installed."
    ),
    # groups
    "moe=dynmo": "moe: no option 'dynmo'. Did you mean 'dynmoe'? Options: ",
    "logger=[csv,tensorbord]": "logger: no option 'tensorbord'. Did you mean 'tensorboard'?",
    "hydra.verbos=1": "Could not override 'hydra.verbos'.",
    "seed=1,2": "seed=1,2: several values need a sweep: add -m. A list is written seed=[...]",
    # rules
    "moe.top_k=2": "moe.top_k: the router of moe=dynmoe takes no top_k. Choose moe=topk or ",
    "moe.num_experts=0": "moe.num_experts: expected 1 or more, found 0",
    "moe.num_experts=99": "moe: num_experts (99) > max_experts (",
    "moe.adaptation.min_experts=0": "moe.adaptation.min_experts: expected 1 or more, found 0",
    "moe.adaptation.min_experts=9": "moe: adaptation.min_experts (9) > num_experts (",
    "moe.init=cluster": (
        "moe.init: cluster makes experts whose outputs add up, but this router's weights sum to 1."
    ),
    "moe.layers=[1,1]": "moe.layers: expected distinct indices, found [1, 1]",
    "moe.layers=[-1]": "moe.layers: expected indices from 0, found [-1]",
    "moe.layers=[6]": (
        "moe.layers: expected block indices below 6 (backbone.options.depth), found [6]"
    ),
    "moe.layers=[]": "moe.layers: [] leaves the router without a layer: choose moe=dense",
    "moe.layers=none": "moe.layers: none leaves the router without a layer: choose moe=dense",
    "name=../elsewhere": "name: expected a folder below paths.outputs, found '../elsewhere'.",
    "name=/tmp/x": "name: expected a folder below paths.outputs, found '/tmp/x'.",
    f"paths.outputs={__file__}/runs": (
        f"paths.outputs: '{__file__}' is not a folder, found '{__file__}/runs'"
    ),
    "moe.router=null": "moe: layers is every_two, but router is null: MoE layers need a router.",
    "data.test_envs=[]": "data.test_envs: empty: name at least one environment to test on",
    "data.test_envs=[1,1]": "data.test_envs: expected distinct indices, found [1, 1]",
    "data.test_envs=[-1]": "data.test_envs: expected indices from 0, found [-1]",
    "data.test_envs=[sketch,9]": (
        "data.test_envs: there is no environment sketch, 9. Expected indices or names: 0 (0), "
    ),
    "data.test_envs=['0','15',2,3,4,5]": (
        "data.test_envs: [0, 1, 2, 3, 4, 5] leaves no environment to train on."
    ),
    "trainer.accumulate_grad_batches=5": (
        "data.batch_size: 32 does not divide into 1 devices x 5 accumulated parts. "
        "Choose a multiple of 5."
    ),
    "task.steps=0": "task.steps: expected 1 or more, or -1 for no end, found 0",
    "task.eval_every=0": "task.eval_every: expected 1 or more, found 0",
    "seed=-1": "seed: expected from 0 to 4294967295, found -1",
    "protocol.holdout_fraction=1": (
        "protocol.holdout_fraction: expected a share between 0 and 1, found 1.0"
    ),
    "moe.adaptation.init=pretrained": "moe.adaptation.init: 'pretrained' copies the backbone's",
    "backbone.pretrained=none.txt": (
        "backbone.pretrained: expected true, false or a file ending in .safetensors, .pth, "
        ".pt, .bin, .ckpt, found 'none.txt'"
    ),
    "backbone.pretrained=none.pth": "backbone.pretrained: no file 'none.pth'",
    # Lightning's callbacks, and what a run sets itself
    "+trainer.logger=false": (
        "trainer.logger: expected null, found False; loggers are logger=csv, tensorboard"
    ),
    "+trainer.default_root_dir=x": (
        "trainer.default_root_dir: expected null, found x; folders are paths.outputs=FOLDER"
    ),
    "+trainer.callbacks=[{a: 1}]": "trainer.callbacks[0]: expected a callback, found {'a': 1}",
    "+trainer.callbacks=[EMA]": "trainer.callbacks[0]: expected a callback, found 'EMA'",
    "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EMAWeightAveragin}]": (
        "trainer.callbacks[0]._target_: lightning.pytorch.callbacks has no 'EMAWeightAveragin'. "
        "Did you mean 'EMAWeightAveraging'?"
    ),
    "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decai: 1}]": (
        "trainer.callbacks[0].decai: unknown key. Did you mean 'decay'?"
    ),
    "+trainer.callbacks={_target_: lightning.pytorch.callbacks.Timer, durations: 1}": (
        "trainer.callbacks.durations: unknown key. Did you mean 'duration'?"
    ),
    "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: x}]": (
        "trainer.callbacks[0]: EarlyStopping cannot be added to a run: records would not say that "
        "the run ended early. Set task.patience=N"
    ),
    "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.WeightAveraging}]": (
        "trainer.callbacks[0]: the buffers of MoE layers say which experts live and have no mean. "
        "Set use_buffers: false"
    ),
    "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelPruning}]": (
        "trainer.callbacks[0].pruning_fn: missing."
    ),
    "+logger.own={_target_: lightning.pytorch.loggers.CSVLogger}": "logger.own.save_dir: missing.",
    "~moe.adaptation.period": (
        "moe.adaptation.period: missing. Every DynMoECallback configuration has this key"
    ),
    "backbone.head=keep": "backbone.head: there is none to keep without weights.",
    "backbone.head=kept": "backbone.head: expected 'new' or 'keep', found 'kept'",
    "+data.root=/no/such": "data.root: no folder '/no/such'. Give the folder of the data set:",
}


def test_parameters_may_be_given_by_their_place() -> None:
    node = "{_target_: lightning.pytorch.loggers.CSVLogger, _args_: [folder]}"
    assert problems(TASK, f"+logger.own={node}") == []


@pytest.mark.parametrize("override", CASES)
def test_the_message_of(override: str) -> None:
    found = problems(TASK, override)
    assert [text for text in found if CASES[override] in text], found


def test_outputs_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried, because rights do not tell: root may write to /proc by its rights."""

    def refuse(dir: Path) -> str:
        raise PermissionError(13, "Permission denied", str(dir))

    assert problems(TASK, f"paths.outputs={tmp_path}/a/b") == []
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert problems(TASK, f"paths.outputs={tmp_path}/a/b") == [
        f"paths.outputs: '{tmp_path}' cannot be written to (Permission denied). "
        "Choose another: paths.outputs=FOLDER"
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("moe=topk", "moe.router.min_capacity=4"), CAPACITY),
        (("moe=gmoe", "moe.router.min_capacity=4"), CAPACITY),
        (("moe=emoe", "moe.router.min_capacity=4"), CAPACITY),
        (("moe=gmoe", "moe.router.noise=0"), NOISE),
        (("moe=topk", "moe.router.aux=importance_load"), NOISE),
        (("moe=topk", "moe.aux_weight=0", "moe.router.z_weight=0.1"), NO_AUX),
        (("moe=unifmoe", "moe.init=copy"), WHOLE),
        (("moe=dynmoe", "moe.conflict.weight=1"), NO_LOGITS),
        (("moe=dense", "moe.conflict.weight=1"), NO_LOGITS),
        (("moe=softmoe", "moe.conflict.weight=1"), NO_LOGITS),
        (("moe=moepp", "moe.conflict.weight=1"), "moe.conflict.weight: needs logits of each"),
        (("moe=topk", "moe.conflict.weight=1", "trainer.precision=16-mixed"), SCALED),
        (("moe=topk", "moe.conflict.threshold=2"), "moe.conflict.threshold: expected a cosine"),
        (("moe=topk", "moe.conflict.weight=-1"), "moe.conflict.weight: expected 0 or more"),
        (("moe=topk", "moe.conflict.every=0"), "moe.conflict.every: expected 1 or more"),
    ],
)
def test_options_of_a_router_that_need_others(overrides: tuple[str, ...], message: str) -> None:
    (found,) = problems(TASK, *overrides)
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("moe=dtopp", "moe.router.target_k=0.5"), "moe.router.target_k: expected 1 or more"),
        (("moe=dtopp", "moe.router.target_k=[1,2]"), "set moe.router.per_layer=true"),
        (("moe=remoe", "moe.router.target_k=[1,2]"), "set moe.router.per_layer=true"),
        (("moe=remoe", "moe.aux_weight=0.01"), "moe.aux_weight: expected 1 with this router"),
        (("moe=remoe", "moe.router.lambda_rate=1.0"), "moe.router.lambda_rate: expected more than"),
        (("moe=beam", "moe.router.target_k=5"), "expected at most moe.router.top_k, 4, found 5"),
        (("moe=topp", "moe.router.top_p=1.5"), "moe.router.top_p: expected a share from 0 to 1"),
    ],
)
def test_numbers_that_do_not_fit_a_router(overrides: tuple[str, ...], message: str) -> None:
    (found,) = problems(TASK, *overrides)
    assert message in found


@pytest.mark.parametrize(
    "moe", ["topp", "xmoe", "mass", "dtopp", "remoe", "expert_choice", "expert_threshold", "beam"]
)
def test_routers_as_they_come(moe: str) -> None:
    assert problems(TASK, f"moe={moe}") == []
    assert problems(TASK, f"moe={moe}", "moe.num_experts=4") == []


def test_expert_choice_is_refused_for_causal_models() -> None:
    glue = ("task=glue", "name=t", "backbone=bert_tiny", "moe=expert_choice")
    for overrides in (("task=vl", "name=t", "moe=expert_choice"), (*glue, DECODER)):
        (found,) = problems(*overrides)
        assert "causal" in found and "moe=expert_threshold" in found
    assert problems(*glue) == []


DECODER = "backbone.architecture=gpt2"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("13", "moe.router.target_k: expected at most the number of experts, 12, found 13."),
        ("[2,0.5]", "moe.router.target_k: 0.5 experts per token need moe.router.unserved=nothing"),
        ("0", "moe.router.target_k: expected more than 0, found 0"),
        ("[]", "moe.router.target_k: expected one number, or one for each MoE layer"),
    ],
)
def test_a_budget_within_reach(target: str, message: str) -> None:
    found = problems(TASK, "moe=dynmoe_budget", f"moe.router.target_k={target}")
    assert found[0].startswith(message)


def test_clipping_in_mixed_precision_needs_a_plain_optimizer() -> None:
    clip = (TASK, "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0")
    (text,) = problems(*clip)
    assert "task.optimizer.fused=false" in text
    assert problems(*clip, "task.optimizer.fused=false") == []


def test_a_fixed_router_fills_its_slots() -> None:
    found = problems(TASK, "moe=topk", "moe.num_experts=4", "moe.max_experts=8")
    assert found == [f"{SLOTS} Set moe.max_experts=4."]


@pytest.mark.parametrize(
    ("command", "experts"),
    [
        (["moe=dynmoe"], (16, 16)),
        (["moe=dynmoe", "moe.max_experts=20"], (16, 20)),
        (["moe=topk"], (16, 16)),
        (["moe=native"], (16, 16)),
        (["moe=dynmoe", "+backbone.options.num_experts=4"], (4, 4)),
        (["moe=dense"], (1, 1)),
    ],
)
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_mixture_keeps_the_number_of_its_experts(
    command: list[str],
    experts: tuple[int, int],
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a folder, or on the hub and downloaded before."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--me--olmoe" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "olmoe", "num_experts": 16}')
    (tmp_path / "models--me--olmoe" / "refs").mkdir()
    (tmp_path / "models--me--olmoe" / "refs" / "main").write_text("abc")
    model = f"backbone.path={folder}" if place == "folder" else "backbone.model=me/olmoe"
    given = ["task=glue", "backbone=bert_base", model, *command]
    assert problems(*given) == []
    with search_path():
        moe = compose("config", given).moe
    assert (moe.num_experts, moe.max_experts) == experts


@pytest.mark.parametrize(("moe", "init"), [("emoe", "copy"), ("emoe_learn", "auto")])
def test_whole_experts_do_not_add_up(moe: str, init: str) -> None:
    (found,) = problems(TASK, f"moe={moe}", f"moe.init={init}")
    assert found == (
        f"moe.init: {init} makes whole experts, but moe.router adds up outputs. "
        "Set moe.init=cluster or random."
    )


def test_one_wrong_value_is_reported_once_however_often_it_is_used() -> None:
    assert problems(TASK, "hparams_seed=x") == ["hparams_seed: expected an integer, found 'x'"]
    assert problems(TASK, "moe=topk", "moe.top_k=x") == [
        "moe.top_k: expected an integer, found 'x'"
    ]


def test_without_a_task_the_other_mistakes_are_reported_as_well() -> None:
    choose, other = problems("sede=1")
    assert choose.startswith("task: required, what to learn, e.g. task=vit_domainbed or ")
    assert other == "sede: unknown key. Did you mean 'seed'?"


def test_an_unknown_task_is_one_message() -> None:
    assert len(problems("task=vit_domainbeds")) == 1


# --- sweeps ---


def test_an_unknown_launcher_names_those_that_are_known() -> None:
    (found,) = problems(TASK, "hydra/launcher=basc", "seed=0,1", multirun=True)
    assert found.startswith("hydra/launcher: no option 'basc'. Did you mean 'basic'? Options: ")


def test_a_launcher_that_is_not_installed_names_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynmoe.config.clusters.find_spec", lambda _: None)
    for name, extra in {"ray": "ray", "submitit_slurm": "submitit"}.items():
        (found,) = problems(TASK, f"hydra/launcher={name}", "seed=0,1", multirun=True)
        assert found.startswith("hydra/launcher: needs ") and f'".[{extra}]"' in found


def test_a_launcher_of_sweeps_starts_no_single_run() -> None:
    for name in ("ray", "submitit_local", "submitit_slurm"):
        (found,) = problems(TASK, f"hydra/launcher={name}")
        assert found.startswith("hydra/launcher: ") and "Add -m" in found


def test_every_value_of_a_sweep_is_checked() -> None:
    found = problems(TASK, "moe=topk,gmoe", "moe.top_k=1,2,7,9", multirun=True)
    assert [text.split(":")[1].split("a token")[0].strip() for text in found] == [
        "top_k (9) > num_experts (8)"
    ]
    assert problems(TASK, "moe=topk,dynmo", "seed=range(0,3)", multirun=True)[0].startswith(
        "moe: no option 'dynmo'"
    )


@pytest.mark.parametrize("override", ["trainer.devices=2", "trainer.strategy=ddp", "trainer=ddp"])
def test_a_sweep_runs_on_one_device(override: str) -> None:
    alone = problems(TASK, override)
    (found,) = set(problems(TASK, override, "seed=0,1", multirun=True)) - set(alone)
    assert found.startswith("trainer: a sweep runs each job on one device, found devices=")


def test_a_sweep_over_tasks_needs_a_name() -> None:
    tasks = "task=vit_domainbed,vit_domainbed"
    assert problems(tasks, multirun=True) == [
        "name: a sweep over tasks has to name the folder of the runs, e.g. name=my_runs"
    ]
    assert problems(tasks, "name=both", multirun=True) == []


# --- configuration files of the user ---


@pytest.fixture
def own(tmp_path: Path) -> Path:
    files = {
        "moe/own.yaml": "defaults: [topk, _self_]\nname: own\nrouter: {nois: 1.0}\n",
        "sweep/own.yaml": (
            "# @package _global_\n"
            "hydra: {mode: MULTIRUN, sweeper: {params: {moe: 'topk,gmoe', moe.top_k: '1,7'}}}\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_config_dir_and_searchpath_are_followed(own: Path) -> None:
    message = ["moe.router.nois: unknown key. Did you mean 'noise'?"]
    assert problems(TASK, "moe=own", config_dir=str(own)) == message
    assert problems(TASK, "moe=own", f"hydra.searchpath=[{own}]") == message
    assert problems(TASK, config_dir="/no/such") == ["--config-dir: no folder '/no/such'"]


def test_the_parameters_of_a_sweep_file_are_checked(own: Path) -> None:
    (found,) = problems(TASK, "sweep=own", "moe=gmoe", config_dir=str(own))
    assert found.startswith("moe: top_k (7) > num_experts (6)")
    assert problems(TASK, "sweep=own", "moe=topk", config_dir=str(own)) == []


def test_plain_values_are_forced_and_nothing_else() -> None:
    given = [TASK, "seed=1", "++trial_seed=2", "hydra.verbose=true", "+trainer.max_time=null"]
    assert preflight(given).instead == {"seed=1": "++seed=1"}


# --- modality ---


def test_task_and_data_speak_of_the_same_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spoken.py").write_text("class Sentences:\n    modality = 'text'\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = problems(TASK, "+data.x=1", "data._target_=spoken.Sentences")
    mixed = [text for text in found if text.startswith("data: ")]
    assert len(mixed) == 1
    assert mixed[0].startswith(
        "data: task.module works on image, this data on text. Choose data=colored_digits or "
    )
