"""``dynmoe-run``: train one configuration, or many with ``-m``; see ``dynmoe-run --help``."""

from __future__ import annotations

from dynmoe import cli
from dynmoe.job import job


def main() -> None:
    cli.run(job, prog="dynmoe-run")


if __name__ == "__main__":
    main()
