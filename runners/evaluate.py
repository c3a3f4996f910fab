"""``dynmoe-eval run=FOLDER``: evaluate a trained run again, from its own config and checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from dynmoe import process
from dynmoe.records import RunFolder
from dynmoe.training.evaluate import OVERRIDES, answer, evaluate, parse, submit

HELP = """dynmoe-eval evaluates a trained run again, from its own configuration and checkpoint.

  dynmoe-eval run=FOLDER [mode=evaluate|answer|submit|budget|quantize]
              [checkpoint=selected|last|FILE] [key=value ...]

run=FOLDER     the folder of a run, outputs/<name>/<run>.
mode=evaluate  (default) prints every score beside the recorded one; on the same machine they are
               equal. It writes nothing.
mode=answer    task=vl: answers the questions of the run's sets, or of the published sets that
               question_sets.<set>=FOLDER names (question_sets.gqa=/data/gqa, ...),
               and writes FOLDER/answers/<set>/ in the format of their evaluators.
mode=submit    GLUE tasks: predicts the test sets and writes FOLDER/submission/*.tsv in the format
               of the GLUE server.
mode=budget    evaluates with fewer and more experts per token, nothing trained: by budget.rule=
               (threshold, entropy, ratio, quantile or top_k; default: all that fit the router) at
               budget.targets= mean experts per token ([1,1.5,2,3]), or at the budget.values= of a
               rule's cut; writes FOLDER/budget.jsonl and FOLDER/figures/budget.png.
mode=quantize  evaluates with weights of few bits, nothing trained: quant.method=gptq or rtn,
               quant.bits.default=4 and more for some (quant.bits.attention=, .shared=, .experts=,
               .blocks=, .linears=, .named=); several values, separated by commas, are as many
               quantisations. quant.export=int8 or int4 also writes torchao's weights. Writes
               FOLDER/quantize.jsonl and FOLDER/figures/quantize.png.
checkpoint=    the checkpoint to load (default: selected).
targets=       packages, separated by commas, whose code the run's configuration may call beside
               dynmoe's, PyTorch's and Lightning's: that of a router of your own.
--version      prints the version and the commit.

Keys of the configuration that may be given: {keys}
"""


def main() -> None:
    """Exit 0, or 2 with a message that names what is wrong."""
    arguments = sys.argv[1:]
    with process.command("dynmoe-eval", "The same command begins again."):
        if {"-h", "--help"} & set(arguments):
            print(HELP.format(keys=", ".join(OVERRIDES)))
            return
        mode, folder, checkpoint, cfg = parse(arguments)
        modes: dict[str, Callable[..., object]] = {
            **{"evaluate": evaluate, "answer": answer, "submit": submit},
            **{"budget": budget, "quantize": quantize},
        }
        modes[mode](folder, checkpoint, cfg)


def budget(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> None:
    """Import what only this mode needs."""
    from dynmoe.training import budgets

    budgets.budget(folder, checkpoint, cfg)


def quantize(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> None:
    """Import what only this mode needs."""
    from dynmoe.training import quantize as quantisation

    quantisation.quantize(folder, checkpoint, cfg)


if __name__ == "__main__":
    main()
