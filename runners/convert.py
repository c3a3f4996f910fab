"""``dynmoe-convert``: runs for other software, and published checkpoints into run folders."""

from __future__ import annotations

import sys
from pathlib import Path

from dynmoe import process
from dynmoe.config.arguments import joined
from dynmoe.errors import ConfigError

HELP = """dynmoe-convert writes a trained run for other software, and reads published models.

  dynmoe-convert run=FOLDER to=FOLDER [format=transformers|onnx|llava] [overwrite=true]
                 [checkpoint=selected|last|FILE] [backbone.path=FOLDER] [data.root=FOLDER]
  dynmoe-convert from=FOLDER to=FOLDER [tokenizer=FOLDER] [vision=FOLDER] [overwrite=true]

run=FOLDER        a finished run. Slots without an expert are left out. The command loads what it
                  wrote, and fails if its logits are not those of the run's model.
format=           transformers  of task=glue and task=lm: from_pretrained loads the folder. Models
                                that no class of transformers expresses bring their code along, a
                                file that needs trust_remote_code=True.
                  onnx          of task=vit_domainbed: model.onnx for any batch, and
                                preprocessing.json (extra onnx).
                  llava         of task=vl on StableLM, Qwen2 or Phi, or of a converted model:
                                model.safetensors and config.json for the official code.
                  The default is the one that fits the run.
checkpoint=       the checkpoint to write (default: selected; llava: last).
backbone.path=    the folder of a model that was trained from a folder, if it lies elsewhere now.
data.root=        the data that the run's tokenizer was made of, if they lie elsewhere now.
targets=          packages, separated by commas, whose code the run's configuration may call beside
                  dynmoe's, PyTorch's and Lightning's: that of a router of your own.

from=FOLDER       a MoE-LLaVA or DynMoE-LLaVA model as on the Hugging Face Hub: config.json, weights
                  (*.safetensors or pytorch_model*.bin), and its tokenizer if it has a fast one.
                  to=FOLDER becomes a finished run: dynmoe-eval run=FOLDER mode=answer evaluates
                  it, and dynmoe-run task=vl stage.start=FOLDER trains on from a dense one.
tokenizer=FOLDER  takes the tokenizer from there.
vision=FOLDER     takes the CLIP that config.json names from there, instead of from the hub.

overwrite=true    replaces what this command wrote before.
--version         prints the version and the commit.
"""

KEYS = (
    *("from", "run", "to", "format", "checkpoint", "tokenizer", "vision", "overwrite"),
    *("backbone.path", "data.root", "targets"),
)
ONLY_WITH = {
    **{"format": "run", "checkpoint": "run", "backbone.path": "run", "data.root": "run"},
    "targets": "run",
    **{"tokenizer": "from", "vision": "from"},
}


def main() -> None:
    """Exit 0, or 2 with a message that names what is wrong."""
    arguments = sys.argv[1:]
    with process.command("dynmoe-convert", "The same command with overwrite=true begins again."):
        if {"-h", "--help"} & set(arguments):
            print(HELP)
            return
        given = parse(arguments)
        from dynmoe.convert.checkpoints import from_official
        from dynmoe.convert.export import export

        (from_official if "from" in given else export)(given)


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
