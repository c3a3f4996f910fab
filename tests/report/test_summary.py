"""A summary's numbers are those computed by hand from the records; both renderings show them."""

from __future__ import annotations

from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dynmoe.errors import UserError
from dynmoe.records import RunFolder
from dynmoe.report.run import Run, read_run
from dynmoe.report.summary import to_console, to_markdown
from dynmoe.selection import measured_by

LAYER = "blocks.4.mlp"
SIZES = {"expert": 100, "router": 10, "router_fixed": 1}
RUN = {
    "algorithm": "DynMoE",
    "backbone": "vit_tiny",
    "baseline": None,
    "dataset": "RotatedDigits",
    "device": "cpu",
    "threads": 2,
    "runtime": {
        "matmul_precision": "medium",
        "malloc": "tuned",
        "fused_attention": False,
        "precision": "32-true",
        "fused_optimizer": True,
        "wait": "GOMP_SPINCOUNT=0",
    },
    "bf16_gain": 3.04,
    "env_names": ["0", "15", "30"],
    "hparams_seed": 0,
    "costs": {"parameters": {"other": 1000, "layers": {LAYER: SIZES}}},
    "config": {"moe.algorithm": "DynMoE"},
    "modality": "image",
    "measure": "accuracy",
    "protocol": "domainbed",
    "seed": 7,
    "selection": "training_domain_validation",
    "start_experts": {LAYER: 2},
    "steps": 21,
    "test_envs": [1],
    "trial_seed": 3,
    "weights": "from scratch",
}
DENSE = {
    "costs": {"parameters": {"other": 1000, "layers": {}}},
    "start_experts": {},
    "algorithm": "ERM",
    "config": {"moe.algorithm": "ERM", "moe.router": None},
}


def facts_of(run: dict[str, Any]) -> dict[str, Any]:
    return measured_by(run["selection"], run["env_names"], run["test_envs"]) | run


def dense_run(path: Path, **facts: Any) -> RunFolder:
    """Three environments, the second held out; validation is best at step 10 of 0, 10, 20."""
    folder = RunFolder(path)
    run = RUN | DENSE | facts
    folder.write_run(facts_of(run))
    for step, out, loss, step_time in (
        (0, 0.2, 3.0, 2.0),
        (10, 0.8, 1.0, 0.5),
        (20, 0.7, 0.5, 0.3),
    ):
        record = {"step": step, "loss": loss, "step_time": step_time, "mem_gb": 0.5 + step / 100}
        accuracies = {"0/in": 0.9, "0/out": out, "15/in": 0.6 + step / 1000, "15/out": 0.5}
        accuracies |= {"30/in": 0.7, "30/out": out - 0.1}
        scores = {name: {"accuracy": value, "loss": 0.25} for name, value in accuracies.items()}
        folder.append("results", record | {"scores": scores})
    return folder


def moe_run(path: Path, **facts: Any) -> RunFolder:
    """The dense run with one MoE layer: 2 experts, 3 at the selected step, 2 in the end."""
    moe = {key: RUN[key] for key in DENSE}
    folder = dense_run(path, **(moe | facts))
    mean_k = {"train": 1.2, "0": 1.0, "15": 1.4, "30": 2.0}
    for step, slots in ((0, [0, 1]), (10, [0, 1, 3]), (20, [0, 3])):
        for source, k in mean_k.items():
            line = {"step": step, "layer": LAYER, "source": source, "slots": slots, "tokens": 100}
            folder.append("routing", line | {"mean_k": k + step / 100, "unrouted": step / 200})
    for step, removed, added, after in ((9, [], 3, 3), (14, [0, 1], 0, 2), (19, [], None, 2)):
        event = {"step": step, "layer": LAYER, "removed": removed, "added": added, "after": after}
        folder.append("events", event)
    return folder


def console(summary: Run) -> str:
    file = StringIO()
    Console(file=file, width=120).print(to_console(summary))
    return file.getvalue()


def test_scores_and_cost_of_the_selected_step(tmp_path: Path) -> None:
    run = read_run(moe_run(tmp_path))
    assert (run.outcome.step, run.outcome.is_selected, run.steps_taken) == (10, True, 21)
    assert run.scores["15/in"] == {"accuracy": 0.61, "loss": 0.25}
    assert run.step_seconds == pytest.approx((1 * 2.0 + 10 * 0.5 + 10 * 0.3) / 21)
    assert run.peak_memory == 0.7


def test_experts_and_parameters_of_the_selected_step(tmp_path: Path) -> None:
    run = read_run(moe_run(tmp_path))
    (layer,) = run.layers
    counts = {"name": LAYER, "start": 2, "added": 2, "removed": 2, "end": 2, "experts": 3}
    shares = {"k_train": 1.3, "k_test": 1.5, "unrouted": 0.05}
    assert asdict(layer) == pytest.approx(counts | shares)
    text = to_markdown(run)
    assert f"- parameters: {1000 + 3 * (100 + 10) + 1:,} " in text
    assert f"- activated per token: {1000 + 1.5 * 100 + 3 * 10 + 1:,.0f} " in text


def test_the_last_step_counts_where_one_run_cannot_select(tmp_path: Path) -> None:
    run = read_run(moe_run(tmp_path, selection="leave_one_domain_out"))
    assert (run.outcome.step, run.outcome.is_selected) == (20, False)
    assert run.outcome.accuracy == 0.62
    text = to_markdown(run)
    assert f"- parameters: {1000 + 2 * (100 + 10) + 1:,} " in text
    rule = "leave-one-domain-out validation does not decide within one run"
    assert f"Scores at the last step, 20 of 21; {rule}" in text


def test_mean_k_on_several_test_environments_is_over_their_tokens(tmp_path: Path) -> None:
    folder = moe_run(tmp_path, test_envs=[1, 2])
    (layer,) = read_run(folder).layers
    assert layer.k_test == pytest.approx((1.4 + 2.0) / 2 + 0.2)


def test_a_run_without_test_environment_activates_what_all_need(tmp_path: Path) -> None:
    (layer,) = read_run(moe_run(tmp_path, test_envs=[])).layers
    assert layer.k_test == pytest.approx((1.0 + 1.4 + 2.0) / 3 + 0.2)


def test_missing_measures_are_shown_as_a_dash(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run(facts_of(RUN))
    scores = {"0/out": {"accuracy": 0.5}, "15/in": {"accuracy": 0.5}, "15/out": {"loss": 0.5}}
    folder.append("results", {"step": 0, "scores": scores, "step_time": 0.5, "mem_gb": 1.0})
    markdown = to_markdown(read_run(folder))
    assert "| 0/out (selects) | 50.0 | – |" in markdown
    assert "| 15/out | – | 0.5000 |" in markdown
    assert "- training loss: – " in markdown and "- activated per token: – " in markdown
    assert f"| {LAYER} | 2 → 2 | 2 | – | – | – |" in markdown
    assert "- speed: 2.00 steps/s on cpu" in markdown
    assert "- unfinished: 1 of 21 steps are recorded" in markdown


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run(facts_of(RUN))
    with pytest.raises(UserError, match=r"expected at least one line in results\.jsonl, found"):
        read_run(folder)


def test_markdown_of_an_moe_run(tmp_path: Path) -> None:
    scores = {"15/in": {"accuracy": 0.412}}
    baseline = {"name": "linear classifier on pixels", "scores": scores}
    folder = moe_run(tmp_path, baseline=baseline)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "accuracy.png").touch()
    assert (
        to_markdown(read_run(folder))
        == f"""\
# DynMoE on RotatedDigits, test environment 15

Protocol domainbed, selection training-domain validation; seed 7, trial seed 3, hparams seed 0; \
backbone vit_tiny, from scratch

## Scores at the selected step, 10 of 21

| environment | accuracy, % | loss |
| --- | ---: | ---: |
| 0/in | 90.0 | 0.2500 |
| 0/out (selects) | 80.0 | 0.2500 |
| 15/in (reported) | **61.0** | 0.2500 |
| 15/out | 50.0 | 0.2500 |
| 30/in | 70.0 | 0.2500 |
| 30/out (selects) | 70.0 | 0.2500 |
| mean of those that select | 75.0 |  |

linear classifier on pixels: 41.2 % on 15/in

## Experts

| MoE layer | experts | at step 10 | mean k, train | mean k, 15 \
| unrouted |
| --- | ---: | ---: | ---: | ---: | ---: |
| {LAYER} | 2 → 2 (+2, −2) | 3 | 1.30 | 1.50 | 5.0 % |

experts: start → end of the run; k: experts per token; unrouted: training tokens that chose none; \
all but the first at step 10.

## Run

- parameters: 1,331 (living experts only)
- activated per token: 1,181 (at the mean k on 15)
- training loss: 0.5000 (mean over the last window)
- speed: 2.10 steps/s on cpu
- runtime: 2 threads (GOMP_SPINCOUNT=0), 32-true, matmul medium, malloc tuned, plain \
attention, fused optimizer
- faster here: trainer.precision=bf16-mixed: this CPU has bf16 matrix units; products of this \
model's size ran 3.0 x as fast as in fp32
- peak memory: 0.70 GiB
- figures: accuracy.png

## Figures

![accuracy](figures/accuracy.png)
"""
    )


def test_a_dense_run_says_so_and_has_no_table_of_experts(tmp_path: Path) -> None:
    run = read_run(dense_run(tmp_path))
    for text in (to_markdown(run), console(run)):
        assert "1,000, all of them active (no MoE layer)" in text
        assert "MoE layer |" not in text and "Experts" not in text


def test_the_console_shows_the_numbers_of_the_markdown(tmp_path: Path) -> None:
    text = console(read_run(moe_run(tmp_path)))
    for part in ("test environment 15", "61.0", "2 → 2 (+2, −2)", "1.50", "1,331", "2.10 steps/s"):
        assert part in text
