"""One job: a run from its configuration to its summary, or a check of its data or its progress."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dynmoe import passes, process, ranks
from dynmoe.config import places, runs
from dynmoe.errors import ConfigError, DataError, Diverged, UserError, reason_of
from dynmoe.records import LOCKS, VOCABULARY, Held, RunFolder, Seal

if TYPE_CHECKING:
    from dynmoe.data.base import TaskData

OTHER_DATA = (
    "data {}: not those that this run was trained on ({}). Put them back, name another folder for "
    "the run: name=NAME, or begin again: overwrite=true\n{}"
)
AS_THEY_ARE = "records_as_they_are"  # a file by which a user says so, of a run that is to go on
WAIT = 7 * 24 * 3600.0  # seconds that a run waits for another one to finish the stage before
LOOK = 60.0  # seconds until it tells the other processes that it still waits


def job(cfg: DictConfig) -> float | None:
    """One run, from its configuration to its summary. Returns the number it is selected by, a loss
    with the opposite sign: more is better.

    A finished run is shown, not repeated; an interrupted one goes on from its last evaluation.
    """
    from hydra.core.hydra_config import HydraConfig

    passes.say_every(cfg.runtime.progress_every)
    folder = RunFolder(HydraConfig.get().runtime.output_dir)
    beside, trained = folder.path.parent / LOCKS / folder.path.name, False
    if ranks.rank() > 0:
        if cfg.mode == "train" and ranks.told_to_train(beside):
            train(cfg, folder)
        return None
    if cfg.mode == "check":
        check_data(cfg)
        return None
    if cfg.mode == "plan":
        show_plan(cfg, folder)
        return None
    try:
        with folder.hold():
            if cfg.overwrite and not _is_cleared(folder):
                _clear(folder)
            folder.forget_failure()
            if folder.is_done:
                _refuse_other_data(cfg, folder)
                folder.say(
                    "This run was finished before; nothing is trained (overwrite=true repeats it)."
                )
            else:
                complete_stage_before(cfg, beside)
                ranks.tell_others(beside, ranks.TRAIN)
                with process.stopped_in_c():
                    train(cfg, folder)
                trained = True
                _release_memory()
            return show(folder)
    finally:
        if trained:
            ranks.all_have_heard(beside)
        else:
            ranks.tell_others(beside, ranks.LEAVE)


def complete_stage_before(cfg: DictConfig, beside: Path) -> None:
    """Train the run that this one starts from, unless it is done. Runs that share it wait, and the
    other processes of a run with its first one, which gives its word at `beside`."""
    earlier = runs.previous(cfg)
    if earlier is None:
        return
    folder = RunFolder(runs.run_folder(earlier))
    with _held(folder, beside):
        folder.forget_failure()
        if folder.is_done:
            folder.say(f"stage {earlier.stage.name}: done before, {folder.path}")
            return
        if runs.is_distributed(cfg):
            raise ConfigError(
                f"stage.start: stage {earlier.stage.name} is not done. On several devices stages "
                f"run one by one: run the same command with stage={earlier.stage.name} and "
                "without moe and name first."
            )
        check_model(cfg)
        complete_stage_before(earlier, beside)
        folder.say(f"stage {earlier.stage.name}")
        try:
            train(earlier, folder)
        except UserError:
            folder.remove_unused()
            raise
        score = show(folder, quiet=True)
        folder.say(f"stage {earlier.stage.name}: done, score {100 * score:.1f}")


@contextmanager
def _held(folder: RunFolder, beside: Path) -> Iterator[None]:
    """Hold the folder of a stage, as soon as whoever trains it has ended.

    Raises:
        Held: not within `WAIT` seconds.
    """
    deadline = time.monotonic() + WAIT
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(folder.hold(wait=LOOK))
                break
            except Held:
                if time.monotonic() >= deadline:
                    raise
                ranks.tell_others(beside, ranks.WAIT)
        yield


def check_model(cfg: DictConfig) -> None:
    """Build the model of a later stage without its weights, before an earlier stage is trained.

    Raises:
        ConfigError: it cannot be built.
    """
    from dynmoe.training.build import build_data, shell

    shell(cfg, build_data(cfg), {})


def check_data(cfg: DictConfig) -> None:
    """Read and check the data, every image in full, and print counts and the model; train
    nothing."""
    from dynmoe.training.build import build_data, description, shell

    if "verify" in cfg.data:
        cfg.data.verify = "decode"
    data = build_data(cfg)
    data.setup()
    data.print_check()
    print(description(cfg, shell(cfg, data, data.backbone_arguments)))


def show_plan(cfg: DictConfig, folder: RunFolder) -> None:
    """Print the progress of this run; the sweeper prints all jobs of a sweep."""
    from dynmoe.config.sweeps import SweepJob
    from dynmoe.sweep.manifest import Job, render

    job = Job.of(cfg, folder.path, SweepJob((), folder.path.name, ""))
    print(render([job], parallel=1))
    if cfg.get("plan") is not None:
        from dynmoe.estimate.sizes import show_estimate

        show_estimate(cfg)


def train(cfg: DictConfig, folder: RunFolder) -> None:
    """Build, fit, and leave records and checkpoints in the folder.

    Raises:
        Diverged: the loss or the weights are not finite; the folder says so in `failed.txt`.
        UserError: something ended training before its last step.
        ConfigError: a callback that Lightning refuses.
    """
    if ranks.rank() == 0:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.say(f"run folder: {folder.path}")  # at once: loading PyTorch and the data takes time
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from dynmoe.training import build, mixing
    from dynmoe.training.peers import together
    from dynmoe.training.saving import all_written

    places.make_absolute(cfg)
    settings = build.settle_runtime(cfg)
    data = build.build_data(cfg)
    checkpoint = folder.path / "checkpoints" / "last.ckpt"
    step = _step_of(folder, checkpoint) if ranks.rank() == 0 else -1
    if checkpoint.exists():
        data.restore(folder.path)
    data.setup()
    if checkpoint.exists() and (change := build.other_data(folder, data)):
        raise DataError(OTHER_DATA.format(cfg.data.name, change, folder.path))
    task = build.build_task(cfg, data, settings["fused_attention"])
    callbacks = build.build_callbacks(cfg, data, folder, mixing.mix_data(cfg, data, task, folder))
    trainer = build.build_trainer(cfg, callbacks, folder, data.steps)
    if trainer.is_global_zero:
        OmegaConf.save(cfg, folder.path / "config.yaml", resolve=True)
        data.keep(folder.path)
        facts = build.facts(cfg, data, task, trainer, settings)
        folder.write_run(facts)
        folder.truncate_after(step)
        begin = build.announcement(facts, step)
        for line in [", ".join(begin)] if process.is_worker() else begin:
            folder.say(line)
    start = checkpoint if checkpoint.exists() else None
    try:
        with together(trainer), all_written(trainer, folder.say):
            trainer.fit(task, datamodule=data, ckpt_path=start)
    except MisconfigurationException as error:  # of a callback: a monitor without a logger, ...
        raise ConfigError(f"trainer: {error}") from error
    except Diverged as error:
        if trainer.is_global_zero:
            folder.mark_failed(str(error))
        raise
    if trainer.is_global_zero and trainer.global_step < data.steps:
        results = folder.read("results")
        if not (results and results[-1].get("stopped_early")):
            raise UserError(
                f"{folder.path}: training ended after {trainer.global_step} of {data.steps} steps. "
                "The same command goes on"
            )
    if trainer.is_global_zero:
        add_baseline(folder, data)


def add_baseline(folder: RunFolder, data: TaskData) -> None:
    """Fit what the run is compared with, and note it in `run.json`; no step has waited for it."""
    try:
        baseline = data.baseline()
    except ValueError as error:  # of scikit-learn: one class alone, texts without words
        folder.say(f"no linear baseline: {reason_of(error)}")
    else:
        if baseline is not None:
            folder.add_facts(baseline=baseline)


def show(folder: RunFolder, quiet: bool = False) -> float:
    """Draw the figures and write the summary if that is still to do; print the summary."""
    from rich.console import Console

    from dynmoe.report import figures, summary
    from dynmoe.report.run import read_run

    folder.check_finished()
    run = read_run(folder)
    if not folder.is_done:
        figures.draw_all(run)
        (folder.path / "summary.md").write_text(summary.to_markdown(run), encoding="utf-8")
        folder.mark_done()
    if process.is_worker():
        folder.say("finished")
    elif not quiet:
        Console().print(summary.to_console(run))
        print(f"Run folder, with figures/ and summary.md:\n{folder.path}")  # one line, to be copied
    found = run.outcome.validation
    return -found if run.scale.less_is_better else found


def _refuse_other_data(cfg: DictConfig, folder: RunFolder) -> None:
    """Data from another folder of the same name may be others; from the same one they are trusted.

    Raises:
        DataError: they are.
    """
    saved = folder.path / "config.yaml"
    if not saved.exists():
        return
    from dynmoe.training import trained

    folder.check_unchanged(saved.name)
    if not places.moved(cfg, trained.read(saved)):
        return
    from dynmoe.training import build

    data = build.build_data(cfg)
    data.restore(folder.path)
    data.setup()
    if change := build.other_data(folder, data):
        raise DataError(OTHER_DATA.format(cfg.data.name, change, folder.path))


def _step_of(folder: RunFolder, checkpoint: Path) -> int:
    """The last optimizer step of the checkpoint that the run goes on from; -1 without one.

    Raises:
        ConfigError: the file is damaged, or the records are not those that it has seen.
    """
    from dynmoe.training.saving import is_whole, read_checkpoint

    if not checkpoint.exists():
        return -1
    selected = checkpoint.with_name("selected.ckpt")
    try:
        state = read_checkpoint(checkpoint, mmap=True)
        _check_records(folder, state, checkpoint.name)
    except ConfigError as error:
        sooner = ""
        with suppress(ConfigError):
            _check_records(folder, read_checkpoint(selected, mmap=True), selected.name)
            sooner = f"To go on from an earlier evaluation: cp {selected} {checkpoint}. "
        raise ConfigError(f"{error}. {sooner}overwrite=true starts the run again") from error
    if selected.exists() and not is_whole(selected):  # no later evaluation may replace it
        raise ConfigError(
            f"{selected}: is damaged, and the run would end with it. Remove it to go on without; "
            "overwrite=true starts the run again"
        )
    step: int = state["global_step"]
    return step - 1


def _check_records(folder: RunFolder, state: Mapping[str, Any], name: str) -> None:
    """Compare the records up to the step of a checkpoint with those that it has seen."""
    from dynmoe.training.callbacks import RECORDS

    seen, step = state.get(RECORDS), state["global_step"] - 1
    if seen is None:  # of an earlier version
        return
    found = Seal(folder).at(step)
    wrong = [kind for kind in sorted({*seen, *found}) if seen.get(kind) != found.get(kind)]
    if not wrong:
        return
    files = ", ".join(str(folder.path / f"{kind}.jsonl") for kind in wrong)
    mark, go_on = folder.path / AS_THEY_ARE, ""
    # Without its results a run has no selected step; without the others it lacks tables alone.
    if "results" not in wrong:
        if mark.exists():
            folder.say(f"{files}: changed since step {step}, taken as they are")
            return
        go_on = f". To go on with them as they are: touch {mark}"
    raise ConfigError(
        f"{files}: not as they were at step {step}, when {name} was written; nothing was "
        f"changed{go_on}"
    )


def _release_memory() -> None:
    """Give what a run left free to the system: a sweep's runs in one process left 40 MB each."""
    from dynmoe import runtime  # loads PyTorch, as the run has

    gc.collect()  # models and trainers know each other
    runtime.release_memory()


def _cleared(folder: RunFolder) -> Path:
    """The file that names the job of Slurm that has cleared the folder last."""
    return folder.path.parent / LOCKS / f"{folder.path.name}.cleared"


def _is_cleared(folder: RunFolder) -> bool:
    """Whether this job of Slurm did so before it was requeued: it goes on then."""
    file = _cleared(folder)
    return ranks.is_requeued() and file.exists() and file.read_text() == ranks.slurm_job()


def _clear(run: RunFolder) -> None:
    """Remove what an earlier run of this configuration wrote."""
    folder = run.path
    # First what tells its end: a kill on the way must not leave a finished run without results.
    for name in ("done", "failed.txt", AS_THEY_ARE):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "figures", "tensorboard", "csv"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("*.jsonl", "run.json", "config.yaml", "summary.md", VOCABULARY):
        for file in folder.glob(pattern):
            file.unlink()
    if ranks.slurm_job():
        _cleared(run).write_text(ranks.slurm_job())
