"""``dynmoe-convert``: checkpoints of MoE-LLaVA and DynMoE-LLaVA into run folders, and back."""

from __future__ import annotations

import sys
from pathlib import Path

from dynmoe import process
from dynmoe.config.arguments import joined
from dynmoe.errors import ConfigError

HELP = """dynmoe-convert turns MoE-LLaVA and DynMoE-LLaVA checkpoints into run folders, and back.

  dynmoe-convert from=FOLDER to=FOLDER [tokenizer=FOLDER] [vision=FOLDER] [overwrite=true]
  dynmoe-convert run=FOLDER to=FOLDER [checkpoint=last|selected|FILE] [overwrite=true]

from=FOLDER       a published model as on the Hugging Face Hub: config.json, weights
                  (*.safetensors or pytorch_model*.bin), and its tokenizer if it has a fast one.
                  to=FOLDER becomes a finished run: dynmoe-eval run=FOLDER mode=answer evaluates
                  it, and dynmoe-run task=vl stage.start=FOLDER trains on from a dense one.
tokenizer=FOLDER  takes the tokenizer from there.
vision=FOLDER     takes the CLIP that config.json names from there, instead of from the hub.
run=FOLDER        a converted model, or a run of task=vl on StableLM, Qwen2 or Phi. It writes
                  to/model.safetensors and to/config.json, which the official code reads.
checkpoint=       the checkpoint to convert (default: last).
overwrite=true    replaces files that exist.
--version         prints the version and the commit.
"""

KEYS = ("from", "run", "to", "checkpoint", "tokenizer", "vision", "overwrite")
ONLY_WITH = {"checkpoint": "run", "tokenizer": "from", "vision": "from"}


def main() -> None:
    """Exit 0, or 2 with a message that names what is wrong."""
    arguments = sys.argv[1:]
    with process.command("dynmoe-convert", "The same command with overwrite=true begins again."):
        if {"-h", "--help"} & set(arguments):
            print(HELP)
            return
        given = parse(arguments)
        from dynmoe.convert.checkpoints import from_official, to_official  # loads PyTorch

        (from_official if "from" in given else to_official)(given)


def parse(arguments: list[str]) -> dict[str, str]:
    """Return the arguments by key.

    Raises:
        ConfigError: an unknown key or wrong value, or not exactly one of from= and run=.
    """
    given: dict[str, str] = {}
    arguments, astray = joined(arguments)
    if astray:
        raise ConfigError("\n".join(astray))
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in KEYS:
            known = ", ".join(f"{key}=" for key in KEYS)
            raise ConfigError(f"{argument}: unknown argument, expected {known}")
        given[key] = value
    if "from" in given and "run" in given:
        raise ConfigError("from= and run= are two directions: give one of them")
    if "to" not in given or ("from" in given) == ("run" in given):
        raise ConfigError("expected from=FOLDER to=FOLDER, or run=FOLDER to=FOLDER")
    for key, other in ONLY_WITH.items():
        if key in given and other not in given:
            raise ConfigError(f"{key}= belongs to {other}=FOLDER")
    if given.get("overwrite", "false") not in ("true", "false"):
        raise ConfigError(f"overwrite={given['overwrite']}: expected true or false")
    for key, file in (("from", "config.json"), ("run", "config.yaml")):
        if key in given and not (Path(given[key]).expanduser() / file).is_file():
            raise ConfigError(f"{key}={given[key]}: expected a folder with {file}, found none")
    return given


if __name__ == "__main__":
    main()
