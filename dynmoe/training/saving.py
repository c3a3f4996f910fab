"""Checkpoints on disk: written where they stay, in the background or not, and known to be whole
before they are read; weights that a run starts from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from zipfile import ZipFile

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
)
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dynmoe import process, ranks
from dynmoe.backbones import hub, weights
from dynmoe.config.trainer import OWN_WRITER
from dynmoe.errors import ConfigError, reason_of
from dynmoe.files import check_regular
from dynmoe.records import RunFolder
from dynmoe.training.instantiation import make
from dynmoe.training.trained import checkpoint_of


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint straight to its file, and returns when it is on disk.

    Lightning's own writer needs memory for a second copy, and the folder of temporary files, where
    a kill leaves a file of that size for good.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Raises OSError, with the name of the file, where it cannot be written."""
        if "://" in str(path):  # a callback of one's own, for a place elsewhere
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except (OSError, RuntimeError) as error:
            # NOTE: PyTorch's writer of archives hides the error of the stream behind its own, about
            # positions, and names no file.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            file.unlink(missing_ok=True)
            raise OSError(cause.errno, cause.strerror, str(file)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """What the file holds, on the CPU; it was read before, by ``read_checkpoint``."""
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content


class BackgroundFiles(CheckpointFiles):
    """Writes the checkpoints of ``save`` in a thread, from a copy in CPU memory; others at once.

    There is one copy at most: the next ``save`` waits until this one is on disk, and raises what
    has gone wrong with it. The thread knows no device and no other process.

    The copy is PyTorch's (``torch.distributed.checkpoint.staging``): what shares memory shares it
    there, too. The thread is our own. ``torch.distributed.checkpoint.async_save`` writes folders of
    another format; Lightning's ``AsyncCheckpointIO`` copies on the GPU, queues copies without an
    end, and tells nobody when a file is there, which has yet to take its place.
    """

    def __init__(self) -> None:
        self._then: Callable[[], None] | None = None  # within ``save``
        self._writing: futures.Future[None] | None = None

    def save(self, trainer: L.Trainer, file: Path, then: Callable[[], None]) -> None:
        """Copy what belongs into a checkpoint; ``then`` is called in the thread."""
        self.wait()
        self._then = then
        try:
            trainer.save_checkpoint(file)
        finally:
            self._then = None
        if trainer.is_global_zero and self._writing is None:
            then()  # a strategy that writes by itself, which has done so

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, in the background within ``save``; Lightning's, on the first rank."""
        if self._then is None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing = thread.submit(self._write, _copied(checkpoint), Path(path), self._then)
        thread.shutdown(wait=False)  # it ends with the write

    def _write(self, copy: dict[str, Any], file: Path, then: Callable[[], None]) -> None:
        super().save_checkpoint(copy, file)
        then()

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Wait for the write that is under way. Raises what has gone wrong with it, once."""
        if (writing := self._writing) is not None:
            futures.wait([writing])  # a signal may end the waiting: the write is still under way
            self._writing = None
            writing.result()


def _copied(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU that training does not change."""
    # Here, since not every build of PyTorch has it.
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    try:
        return cast(dict[str, Any], stager.stage(checkpoint))  # a future, where it is asked for one
    finally:
        stager.close()  # it would keep the memory for the next copy


def save(trainer: L.Trainer, file: Path, then: Callable[[], None]) -> None:
    """Save a checkpoint, on all ranks; ``then`` is called on the first one, once it is on disk.

    Raises:
        OSError: it cannot be written, or the one before could not be, in the background.
    """
    files = trainer.strategy.checkpoint_io
    if isinstance(files, BackgroundFiles):
        files.save(trainer, file, then)
        return
    trainer.save_checkpoint(file)
    if trainer.is_global_zero:
        then()


@contextmanager
def all_written(trainer: L.Trainer, say: Callable[[str], None]) -> Iterator[None]:
    """The body saves; when it is left, by an error or a signal as well, all is on disk.

    Raises:
        OSError: the last checkpoint cannot be written. Where the body raises, ``say`` tells it.
    """
    files = trainer.strategy.checkpoint_io
    if not isinstance(files, BackgroundFiles):
        yield
        return
    try:
        yield
        files.wait()
    except BaseException:
        if files.is_writing:
            process.catch_signals_again()  # Lightning ignores the second Ctrl-C
            say("waiting until a checkpoint is on disk")
        try:
            files.wait()
        except Exception as error:
            say(f"the last checkpoint was not written: {reason_of(error)}")
        raise


def read_checkpoint(file: Path, mmap: bool = False) -> dict[str, Any]:
    """Return the content of a run's checkpoint: ``state_dict``, ``global_step`` and more.

    Raises:
        ConfigError: the file is damaged, or something else; it names those beside it that are not.
    """
    try:
        return _read(file, mmap)
    except ConfigError as error:
        whole = [other for other in sorted(file.parent.glob("*.ckpt")) if is_whole(other)]
        if not whole:
            raise
        names = ", ".join(other.name for other in whole)
        raise ConfigError(f"{error}. Whole checkpoints beside it: {names}") from error


def is_whole(file: Path) -> bool:
    """Whether a file is there that ``read_checkpoint`` can read."""
    try:
        _read(file, mmap=True)
    except ConfigError:
        return False
    return True


def _read(file: Path, mmap: bool) -> dict[str, Any]:
    try:
        check_regular(file)
        # PyTorch writes a checksum of every tensor, and does not look at it.
        with ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"it is damaged, in {damaged}")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # a pickle that is none may raise anything
        # NOTE: to a file that it cannot trust PyTorch says how to run its code.
        reason = reason_of(error).partition("(1) In PyTorch")[0]
        raise _no_checkpoint(file, reason) from error
    found = content if isinstance(content, dict) else {}
    if not (
        isinstance(found.get("state_dict"), Mapping) and isinstance(found.get("global_step"), int)
    ):
        raise _no_checkpoint(file, "it has no state_dict and global_step")
    return found


def _no_checkpoint(file: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{file}: not a checkpoint of dynmoe-run (checkpoint=selected, last or FILE): "
        f"{reason.strip()}"
    )


def trainer_plugins(cfg: DictConfig) -> list[Any]:
    """``trainer.plugins``, the writer of checkpoints, and the environment of Lightning that says
    who starts processes.

    Lightning's own choice under Slurm answers its signals with a checkpoint beside ours.
    """
    given: Any = cfg.trainer.get("plugins")
    if OmegaConf.is_config(given):
        given = make(given, "trainer.plugins")
    plugins = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
    in_background = OmegaConf.select(cfg, "task.async_save", default=False)
    if not any(isinstance(each, CheckpointIO) for each in plugins):
        plugins.append(BackgroundFiles() if in_background else CheckpointFiles())
    elif in_background:
        raise ConfigError(OWN_WRITER)
    tasks = ranks.tasks()
    if tasks is None or any(isinstance(each, ClusterEnvironment) for each in plugins):
        return plugins
    if tasks == 1:  # a batch script of a job with several tasks is one process, too
        return [*plugins, LightningEnvironment()]
    # It refuses `srun -n2`, which does not set this, and says no reason.
    nodes = cfg.trainer.get("num_nodes") or 1
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(tasks // nodes))
    return [*plugins, SLURMEnvironment(auto_requeue=False)]


# Weights of an earlier run.

TOWER = "vision."

# Settings of a language model that change its output but not the shapes of its weights.
UNSEEN = ("hidden_act", "layer_norm_eps", "num_attention_heads", "rms_norm_eps", "rope_parameters")


def load_backbone(backbone: nn.Module, start: Path) -> None:
    """Load the last weights of a finished run into a backbone. The backbone keeps its own vision
    tower if a converted checkpoint has none.

    Raises:
        ConfigError: no such run, a checkpoint of an earlier step, weights of another model, or a
            converted checkpoint of a language model with other settings.
    """
    folder = RunFolder(start)
    file = checkpoint_of(folder, "last")
    if not folder.is_done or not file.exists():
        raise ConfigError(
            f"stage.start={start}: expected the folder of a finished run with checkpoints/last.ckpt"
        )
    saved = read_checkpoint(file, mmap=True)
    step, results = saved["global_step"] - 1, folder.read("results")
    if results and results[-1]["step"] != step:  # a converted checkpoint has none
        raise ConfigError(
            f"{file}: is of step {step}, and the run ended with step {results[-1]['step']}. Put "
            "its last checkpoint there, or train it again: overwrite=true"
        )
    state, prefix = saved["state_dict"], "backbone."
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    whole = found
    own = {k: v for k, v in backbone.state_dict().items() if k.startswith(TOWER)}
    if own and not has_tower(found, TOWER):
        if not any(part.startswith(TOWER[:-1]) for part in weights.loaded_parts(backbone)):
            raise ConfigError(
                f"stage.start={start}: has no vision tower, and this backbone's has random "
                "weights. Set backbone.vision.pretrained=true or a file"
            )
        whole = found | own
    place = f"stage.start={start}, for the backbone before it gets MoE layers"
    weights.load_whole(backbone, whole, place)
    weights.remember(backbone, weights.Loaded(tensors=len(found), part="stage.start"))
    _check_language_model(backbone, start)


def _check_language_model(backbone: nn.Module, start: Path) -> None:
    """Compare the settings that a converted checkpoint has in config.json."""
    folder = start / "language_model"
    if not (folder / "config.json").is_file():
        return
    theirs, ours = hub.configuration(None, str(folder), None, {}), backbone.config
    if wrong := [key for key in UNSEEN if getattr(theirs, key, 0) != getattr(ours, key, 0)]:
        raise ConfigError(
            f"stage.start={start}: its language model has another {', '.join(wrong)} than this "
            f"backbone. Take its own: backbone.path={folder} backbone.pretrained=false"
        )


def has_tower(weights: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the vision tower is included: a converted checkpoint may leave it out."""
    return any(name.startswith(prefix) for name in weights)
