"""Runs and data from elsewhere: they execute nothing, name no other files, and break no page."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dynmoe.config.trust import TRUSTED, check_targets
from dynmoe.data.vl.readers import read_entry
from dynmoe.errors import ConfigError, DataError
from dynmoe.records import RunFolder
from dynmoe.training import trained

ROOT = Path(__file__).parent.parent
NODES = {"moe": {"init": "copy"}, "trainer": {}, "data": {}, "backbone": {"pretrained": False}}


def saved(folder: Path, **nodes: object) -> RunFolder:
    OmegaConf.save(OmegaConf.create(NODES | nodes), folder / "config.yaml")
    return RunFolder(folder)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "dynmoe.version.subprocess.run",  # a name of ours for the code of others
        "dynmoe.layers.moe.torch.hub.load",
        "torch.optim.optimizer.torch.load",
        "functools.partial",
        "dynmoe.data.base.__loader__.get_data",  # there once the module is imported
        "dynmoe.layers.moe.__spec__.loader.get_data",
        "torch.optim.adam.__loader__.get_data",
        "no_such_package.Router",
    ],
)
@pytest.mark.parametrize("place", ["data", "a list"])
def test_a_runs_configuration_calls_no_other_code(tmp_path: Path, target: str, place: str) -> None:
    node = {"_target_": target, "command": f"touch {tmp_path / 'called'}"}
    nodes = {"data": node} if place == "data" else {"trainer": {"callbacks": [{"inner": node}]}}
    key = "data._target_" if place == "data" else "trainer.callbacks[0].inner._target_"
    with pytest.raises(ConfigError) as refused:
        trained.configuration(saved(tmp_path, **nodes))
    assert f"{key}={target}" in str(refused.value) and "targets=" in str(refused.value)


def test_code_of_ones_own_is_allowed_by_name(tmp_path: Path) -> None:
    router = {"router": {"_target_": "my_routers.Router"}, "init": "copy"}
    run = saved(tmp_path, moe=router)
    with pytest.raises(ConfigError, match="targets=my_routers"):
        trained.configuration(run, ["my"])
    assert trained.configuration(run, ["my_routers"]).moe == router


def test_every_shipped_target_is_trusted() -> None:
    files = [file for file in (ROOT / "conf").rglob("*.yaml") if "hydra" not in file.parts]
    nodes = [node for file in files if OmegaConf.is_dict(node := OmegaConf.load(file))]
    found = [text for node in nodes for text in targets(OmegaConf.to_container(node))]
    assert len(found) > 40 and "dynmoe.tasks" in TRUSTED
    for target in found:
        if not target.startswith("hydra_plugins"):  # a sweep's, in no run
            check_targets(OmegaConf.create({"_target_": target}), [], target)


def targets(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [text for value in node.values() for text in targets(value)]
    return [text for each in node for text in targets(each)] if isinstance(node, list) else []


@pytest.mark.parametrize("path", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
@pytest.mark.parametrize("form", ["image", "images", "messages"])
def test_images_stay_in_their_folder(path: str, form: str) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    entry: dict[str, object] = {"id": "1", "conversations": turns}
    if form == "messages":
        asked = [{"type": "image", "image": path}, {"type": "text", "text": "what?"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat"}]
        entry = {"id": "1", "messages": messages}
    else:
        entry[form] = path if form == "image" else [path]
    with pytest.raises(
        DataError, match=r"conversation '1'.*secret\.png leads out of the image folder"
    ):
        read_entry(entry, 7, "data.json")
