"""Every option of every group in conf/ composes and passes the check, with some task."""

from __future__ import annotations

from pathlib import Path

import dynmoe.conf
import pytest

from dynmoe.config.preflight import preflight

CONF = Path(dynmoe.conf.__file__).parent
OPTIONS = [
    f"{file.parent.name}={file.stem}"
    for file in sorted(CONF.glob("*/*.yaml"))
    if not file.name.startswith("_") and file.parent.name not in {"local"}
]

TEXT_DATA = ("cola", "glosses", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
TEXT_BACKBONES = (
    *("bert_base", "bert_large", "bert_tiny", "deberta_v3_base", "distilbert", "gpt2", "minilm"),
    *("pythia", "qwen2", "roberta_base", "roberta_large", "smollm2"),
)
TEXTS = {
    *(f"data={name}" for name in TEXT_DATA),
    *(f"backbone={name}" for name in TEXT_BACKBONES),
    *(
        "protocol=glue",
        "protocol=glue_heldout",
        "sweep=glue_small",
        "sweep=paper_glue",
        "experiment=glue_lora",
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, tmp_path: Path) -> None:
    """With the task it is meant for; a sweep chooses a backbone for the data as well."""
    task = "task=glue" if option in TEXTS else "task=vit_domainbed"
    command = [option] if option.startswith("task=") else [task, option]
    found = preflight(command).problems
    if any(text.startswith("data.root: required") for text in found):
        found = preflight([*command, f"data.root={tmp_path}"]).problems
    assert found == []
