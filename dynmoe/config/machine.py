"""Rules about the machine: folders that must be there or be written to, packages, accounts."""

from __future__ import annotations

import netrc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from dynmoe.config.clusters import runs_elsewhere
from dynmoe.config.options import modality, read, written

LONGEST = 255  # bytes of a file's name, on the usual file systems

# Folders of Hydra, and where conf/config.yaml puts them: below paths.outputs.
HYDRAS = ("hydra.run.dir", "hydra.sweep.dir")
SHIPPED = (None, "${paths.outputs}/${name}/${run_name:}", "${paths.outputs}/${name}")

# Loggers by the end of their target: the package, and the way to get it.
LOGGERS = {
    "WandbLogger": ("wandb", 'pip install -e ".[wandb]"'),
    "MLFlowLogger": ("mlflow", 'pip install -e ".[mlflow]"'),
}


def folders(cfg: DictConfig) -> Iterator[str]:
    for key in ("backbone.path", "backbone.vision.path"):
        path = read(cfg, key, str)
        if path is not None and not (Path(path).expanduser() / "config.json").is_file():
            yield (
                f"{key}: expected a folder with a config.json, found none in '{path}'. "
                f"Give its place: {key}=FOLDER"
            )


NO_GPU = "this machine has no GPU that PyTorch can use. Choose trainer=cpu"

# Files of Linux drivers: of NVIDIA, of AMD, of both within Windows.
DEVICES = ("nvidia*", "kfd", "dxg")


def gpu_there(cfg: DictConfig) -> Iterator[str]:
    """Without a driver there is no need to ask PyTorch, which takes seconds to load."""
    if read(cfg, "trainer.accelerator", str) not in ("gpu", "cuda"):
        return
    if sys.platform != "linux" or read(cfg, "mode", str) != "train" or runs_elsewhere(cfg):
        return
    if not (any(any(Path("/dev").glob(name)) for name in DEVICES) or shutil.which("nvidia-smi")):
        yield f"trainer.accelerator: {NO_GPU}"


def data_folder(cfg: DictConfig) -> Iterator[str]:
    if read(cfg, "mode", str) == "plan":  # reads no data
        return
    for key in ("data.root", "data.ood_root"):
        root = read(cfg, key, str)
        if root is not None and not Path(root).expanduser().is_dir():
            yield f"{key}: no folder '{root}'. Give the folder of the data set: {key}=FOLDER"


def run_folder(cfg: DictConfig) -> Iterator[str]:
    name, outputs = read(cfg, "name", str), read(cfg, "paths.outputs", str)
    if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts):
        yield (
            f"name: expected a folder below paths.outputs, found '{name}'. "
            "Another place is chosen by paths.outputs=FOLDER."
        )
    own = {key: read(cfg, key, str) for key in HYDRAS if written(cfg, key) not in SHIPPED}
    for key, folder in {"name": name, "paths.outputs": outputs, **own}.items():
        if folder is None:
            continue
        if not folder.strip() or "\0" in folder:
            yield f"{key}: expected the name of a folder, found '{folder}'"
        elif any(len(part.encode()) > LONGEST for part in Path(folder).parts):
            yield f"{key}: longer than the {LONGEST} bytes that a folder's name may have"
        elif key != "name":
            yield from _unwritable(key, folder)


def _unwritable(key: str, outputs: str) -> Iterator[str]:
    """Tries it: rights alone do not tell, of /proc or of a file system that is read-only."""
    path = Path(outputs)
    parent = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not parent.is_dir():
        yield f"{key}: '{parent}' is not a folder, found '{outputs}'"
        return
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        yield (
            f"{key}: '{parent}' cannot be written to ({error.strerror}). "
            f"Choose another: {key}=FOLDER"
        )


def libraries(cfg: DictConfig) -> Iterator[str]:
    if modality(cfg, "task.module") == "vision-language" and find_spec("transformers") is None:
        yield 'task: needs transformers: pip install -e ".[language]"'


def loggers(cfg: DictConfig) -> Iterator[str]:
    group = cfg._get_node("logger")
    raw: Any = OmegaConf.to_container(group) if isinstance(group, DictConfig) else None
    for name, node in raw.items() if isinstance(raw, dict) else ():
        target = str(node.get("_target_")) if isinstance(node, dict) else ""
        package, install = LOGGERS.get(target.rpartition(".")[2], ("", ""))
        if package and find_spec(package) is None:
            yield f"logger.{name}: needs the package {package}: {install}"
        goes_online = package == "wandb" and read(cfg, "mode", str) == "train"
        if goes_online and node.get("offline") is not True and not _has_wandb_key():
            yield (
                f"logger.{name}: no key of wandb on this machine. Run `wandb login`, set "
                f"WANDB_API_KEY, or write to files alone: logger.{name}.offline=true"
            )


def _has_wandb_key() -> bool:
    """Where wandb looks for its key or is told to need none (sdk/lib/wbauth/authenticate.py)."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
