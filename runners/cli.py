"""The front of the command line: check the whole command first, then hand over to Hydra."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from string import Template

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dynmoe.config import options, resolvers
from dynmoe.config.check import check, report
from dynmoe.config.preflight import preflight, search_path
from dynmoe.errors import UserError

Job = Callable[[DictConfig], float | None]

# At import, not in run(): a parallel launcher's processes import this module with the job, and have
# to resolve the same configuration.
resolvers.register()


def run(job: Job, *, prog: str) -> None:
    """Run `job` on the configuration of the command line.

    A wrong command is refused with every problem it has, exit status 2. A UserError from the job
    does the same in a single run; in a sweep it ends that job only.
    """
    args = get_args_parser().parse_args()
    if args.help:
        print(help_text())
        return
    shows_only = args.hydra_help or args.cfg or args.info or args.shell_completion
    own_tree = args.config_path or args.config_name or args.experimental_rerun
    if not shows_only and not own_tree:
        verdict = preflight(args.overrides, multirun=args.multirun, config_dir=args.config_dir)
        if verdict.problems:
            raise _refusal(prog, report(verdict.problems))
        sys.argv[1:] = [verdict.instead.get(text, text) for text in sys.argv[1:]]
    main = hydra.main(config_path="pkg://dynmoe.conf", config_name="config", version_base="1.3")
    main(_guarded(job, prog))()


def help_text() -> str:
    """What --help prints: the template in conf/hydra/help with our groups and their options."""
    with search_path():
        cfg = options.loader().load_configuration(options.CONFIG_NAME, [], RunMode.MULTIRUN)
        lines = [f"  {name:<11} {', '.join(group)}" for name, group in options.groups().items()]
    return Template(cfg.hydra.help.template).substitute(APP_CONFIG_GROUPS="\n".join(lines))


def _guarded(job: Job, prog: str) -> Job:
    """`job` behind the check of its own configuration: a sweep's combinations, another tree."""

    @functools.wraps(job)  # Hydra names the job after the module of the wrapped function.
    def guarded(cfg: DictConfig) -> float | None:
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            check(cfg, multirun=sweep)
            return job(cfg)
        except UserError as error:
            if sweep:
                raise  # SystemExit would end the whole sweep, an error ends this job alone.
            raise _refusal(prog, str(error)) from None

    return guarded


def _refusal(prog: str, message: str) -> SystemExit:
    print(f"{prog}: {message}", file=sys.stderr)
    return SystemExit(2)
