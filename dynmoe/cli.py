"""The front of the command line: check the whole command first, then hand over to Hydra."""

from __future__ import annotations

import errno
import functools
import math
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any

import hydra
from hydra._internal import hydra as hydra_module
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra_plugins.dynmoe_sweeper import LAUNCHERS, DynMoESweeper
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dynmoe import process
from dynmoe.config import options, runs
from dynmoe.config.arguments import read_arguments
from dynmoe.config.check import check, report
from dynmoe.config.compose import Composer, hand_on, own_launchers, preflight, search_path
from dynmoe.errors import ConfigError, UserError
from dynmoe.records import Held, RunFolder

Job = Callable[[DictConfig], float | None]

# Below every score that runs are judged by: accuracies, correlations.
WORST = -1.0

# At import, not in run(): a parallel launcher's processes import this module with the job, and have
# to resolve the same configuration.
runs.register()


def run(job: Job, *, prog: str) -> None:
    """Run `job` on the configuration of the command line.

    A wrong command is refused with every problem it has, exit status 2. A UserError from the job
    does the same in a single run; in a sweep it ends that job only. Ctrl-C ends both with 130,
    SIGTERM with 143.
    """
    with process.command(prog, process.GOES_ON):
        _run(job, prog)


def _run(job: Job, prog: str) -> None:
    args, sys.argv[1:], astray = read_arguments(get_args_parser(), sys.argv[1:])
    if args.help:
        print(help_text())
        return
    shows_only = args.hydra_help or args.cfg or args.info or args.shell_completion
    own_tree = args.config_path or args.config_name or args.experimental_rerun
    if astray and (shows_only or own_tree):
        raise ConfigError(report(astray))
    single: Any = hydra_module
    asks, starts = Hydra.get_mode, single.run_job
    composer = None
    if not shows_only and not own_tree:
        verdict = preflight(args.overrides, multirun=args.multirun, config_dir=args.config_dir)
        if astray or verdict.problems:
            raise ConfigError(report([*astray, *verdict.problems]))
        sys.argv[1:] = [verdict.instead.get(text, text) for text in sys.argv[1:]]
        composer = verdict.composer
        # NOTE: Hydra would compose the command once more to learn its mode: a fifth of a second.
        Hydra.get_mode = functools.partialmethod(_mode, composer)  # type: ignore[assignment]
    # Hydra looks through installed packages for its plugins, and overlooks editable ones.
    for plugin in (DynMoESweeper, *LAUNCHERS):
        Plugins.instance().register(plugin)
    own_launchers()
    hand_on(composer)
    single.run_job = functools.partial(_start, starts, prog)
    main = hydra.main(config_path="pkg://dynmoe.conf", config_name="config", version_base="1.3")
    try:
        main(_guarded(job, prog))()
    finally:
        Hydra.get_mode = asks  # type: ignore[method-assign]
        single.run_job = starts


def _mode(started: Hydra, composer: Composer, *_: Any, **__: Any) -> RunMode | None:
    """The mode of a command that is checked; its files are read already."""
    options.read_files_once(started.config_loader)
    return composer.mode


def _start(run_job: Callable[..., Any], prog: str, *args: Any, **kwargs: Any) -> Any:
    """Start a single run; Hydra would show a folder, log or `.hydra/` it cannot write by a trace.

    Errors of the job itself are not raised here: Hydra keeps them in what it returns.
    """
    try:
        return run_job(*args, **kwargs)
    except (OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, ValueError) else error  # logging's of run.log
        if not isinstance(cause, OSError) or cause.filename is None:
            raise
        refused = _disk_problem(cause, Path(cause.filename).parent)
        if refused is None:
            raise
        raise process.refusal(prog, refused) from None


def help_text() -> str:
    """Text of --help: the template in conf/hydra/help with our groups and their options."""
    with search_path():
        cfg = options.loader().load_configuration(options.CONFIG_NAME, [], RunMode.MULTIRUN)
        lines = [f"  {name:<11} {', '.join(group)}" for name, group in options.groups().items()]
    return Template(cfg.hydra.help.template).substitute(APP_CONFIG_GROUPS="\n".join(lines))


def _guarded(job: Job, prog: str) -> Job:
    """Check the configuration of the job itself first: a combination of a sweep, another tree."""

    @functools.wraps(job)  # Hydra names the job after the module of the wrapped function.
    def guarded(cfg: DictConfig) -> float | None:
        hydra_cfg = HydraConfig.get()
        sweep = hydra_cfg.mode == RunMode.MULTIRUN
        if not process.is_command():  # a launcher's process
            process.follow_command()
        folder = Path(hydra_cfg.runtime.output_dir)
        try:
            with runs.names_once():
                check(cfg, multirun=sweep)
                result = job(cfg)
            if sweep and result is not None and math.isnan(result):
                result = WORST  # Optuna refuses NaN, and would end at this job each time
        except Held as error:
            if not sweep:
                raise process.refusal(prog, error) from None
            print(f"{prog}: job {hydra_cfg.job.num} is left to the process that is running it")
            return None
        except Exception as error:
            refused = _user_error(error) or _disk_problem(error, folder) or _lost_loader(error)
            if sweep:
                raise _job_failed(prog, hydra_cfg, cfg, refused or error) from None
            if refused is None:
                raise
            _remove_unused(folder)
            raise process.refusal(prog, refused) from None
        except SystemExit as error:  # an interruption, as one that a worker can send
            raise process.interruption(error) or error from None
        if cfg.get("mode") in ("check", "plan"):
            _remove_unused(folder)
        return result

    return guarded


def _user_error(error: BaseException | None) -> UserError | None:
    """Return `error`, or the cause that Hydra's instantiate wrapped, if a user can mend it."""
    while isinstance(error, InstantiationException):
        error = error.__cause__
    if isinstance(error, OmegaConfBaseException):  # a key that the check does not know of
        text = " ".join(str(error.msg or error).split("\n")[0].split())
        return ConfigError(f"{error.full_key or 'configuration'}: {text}")
    return error if isinstance(error, UserError) else None


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _disk_problem(error: Exception, folder: Path) -> UserError | None:
    """A file of the run that cannot be written or read back; other files have their own words."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    place = Path(os.fsdecode(error.filename2 or error.filename or folder))
    if error.errno in FULL:
        return UserError(f"{place}: the disk is full. Make room on it. {process.GOES_ON}")
    if not place.is_relative_to(folder):
        return None
    gone = "" if folder.exists() else ", for the folder of the run is gone"
    return UserError(f"{place}: {error.strerror}{gone}. Mend that. {process.GOES_ON}")


def _lost_loader(error: Exception) -> UserError | None:
    """A process that loads data was killed; PyTorch tells the others by its text alone."""
    if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")):
        return None
    return UserError(
        f"{' '.join(str(error).split())[:200]} If memory is short: data.workers=0 loads in the "
        f"command's own process. {process.GOES_ON}"
    )


def _job_failed(prog: str, hydra_cfg: HydraConf, cfg: DictConfig, error: Exception) -> RuntimeError:
    """Print the error now, because Hydra's launchers do not, and note it in the run's folder.

    The returned error ends only the job, where SystemExit would end the sweep, and, unlike some
    errors, can be sent from one process to another.
    """
    is_users = isinstance(error, UserError)
    message = str(error) if is_users else f"{type(error).__name__}: {error}"
    trace = "" if is_users else traceback.format_exc()
    overrides = " ".join(text.lstrip("+") for text in hydra_cfg.overrides.task)
    print(f"{prog}: job {hydra_cfg.job.num} ({overrides}) failed: {message}", file=sys.stderr)
    if trace:
        print(trace, file=sys.stderr)
    if cfg.get("mode") == "train":
        line = " ".join(message.split())
        with suppress(OSError):  # a full disk
            RunFolder(hydra_cfg.runtime.output_dir).mark_failed(line, trace)
    return RuntimeError(message)


def _remove_unused(folder: Path) -> None:
    with suppress(OSError, Held), RunFolder(folder).hold(wait=0):
        RunFolder(folder).remove_unused()
