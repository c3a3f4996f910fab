"""A summary's numbers are those computed by hand from the records; both renderings show them."""

from __future__ import annotations

import math
from dataclasses import asdict, astuple
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from dynmoe.report.summary import Summary, summarize
from rich.console import Console

from dynmoe.errors import UserError
from dynmoe.records import RunFolder
from dynmoe.report.render import to_console, to_markdown

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
    },
    "env_names": ["0", "15", "30"],
    "hparams_seed": 0,
    "parameters": {"other": 1000, "layers": {LAYER: SIZES}},
    "protocol": "domainbed",
    "seed": 7,
    "selection": "training_domain_validation",
    "start_experts": {LAYER: 2},
    "steps": 21,
    "test_envs": [1],
    "trial_seed": 3,
    "weights": "from scratch",
}
DENSE = {"parameters": {"other": 1000, "layers": {}}, "start_experts": {}, "algorithm": "ERM"}


def dense_run(path: Path, **facts: Any) -> RunFolder:
    """Three environments, the second held out; validation is best at step 10 of 0, 10, 20."""
    folder = RunFolder(path)
    run = RUN | DENSE | facts
    folder.write_run(run)
    for step, out, loss, step_time in (
        (0, 0.2, 3.0, 2.0),
        (10, 0.8, 1.0, 0.5),
        (20, 0.7, 0.5, 0.3),
    ):
        record = {"step": step, "loss": loss, "step_time": step_time, "mem_gb": 0.5 + step / 100}
        record |= {"env0_in_acc": 0.9, "env0_out_acc": out}
        record |= {"env1_in_acc": 0.6 + step / 1000, "env1_out_acc": 0.5}
        record |= {"env2_in_acc": 0.7, "env2_out_acc": out - 0.1}
        folder.append("results", record | {"args": {"test_envs": run["test_envs"]}})
    return folder


def moe_run(path: Path, **facts: Any) -> RunFolder:
    """The dense run with one MoE layer: 2 experts, 3 at the selected step, 2 in the end."""
    moe = {key: RUN[key] for key in DENSE}
    folder = dense_run(path, **(moe | facts))
    mean_k = {"train": 1.2, "env0": 1.0, "env1": 1.4, "env2": 2.0}
    for step, slots in ((0, [0, 1]), (10, [0, 1, 3]), (20, [0, 3])):
        for source, k in mean_k.items():
            line = {"step": step, "layer": LAYER, "source": source, "slots": slots, "tokens": 100}
            folder.append("routing", line | {"mean_k": k + step / 100, "unrouted": step / 200})
    for step, removed, added, after in ((9, [], 3, 3), (14, [0, 1], 0, 2), (19, [], None, 2)):
        event = {"step": step, "layer": LAYER, "removed": removed, "added": added, "after": after}
        folder.append("events", event)
    return folder


def console(summary: Summary) -> str:
    file = StringIO()
    Console(file=file, width=120).print(to_console(summary))
    return file.getvalue()


def test_accuracies_and_cost_of_the_selected_step(tmp_path: Path) -> None:
    summary = summarize(moe_run(tmp_path))
    assert (summary.step, summary.is_selected, summary.last_step) == (10, True, 20)
    assert [astuple(environment) for environment in summary.environments] == [
        ("0", False, 0.9, 0.8),
        ("15", True, 0.61, 0.5),
        ("30", False, 0.7, pytest.approx(0.7)),
    ]
    assert summary.loss == 0.5
    assert summary.steps_per_second == pytest.approx(21 / (1 * 2.0 + 10 * 0.5 + 10 * 0.3))
    assert summary.peak_memory == 0.7


def test_experts_and_parameters_of_the_selected_step(tmp_path: Path) -> None:
    summary = summarize(moe_run(tmp_path))
    (layer,) = summary.layers
    counts = {"name": LAYER, "start": 2, "added": 2, "removed": 2, "end": 2, "experts": 3}
    shares = {"k_train": 1.3, "k_test": 1.5, "unrouted": 0.05}
    found = asdict(layer)
    assert found.pop("k_train_by_part") == found.pop("k_test_by_part") == {}
    assert found == pytest.approx(counts | shares)
    assert summary.total_parameters == 1000 + 3 * (100 + 10) + 1
    assert summary.activated_parameters == pytest.approx(1000 + 1.5 * 100 + 3 * 10 + 1)


def test_the_last_step_counts_where_one_run_cannot_select(tmp_path: Path) -> None:
    summary = summarize(moe_run(tmp_path, selection="leave_one_domain_out"))
    assert (summary.step, summary.is_selected) == (20, False)
    assert summary.environments[1].in_accuracy == 0.62
    assert summary.total_parameters == 1000 + 2 * (100 + 10) + 1
    rule = "leave-one-domain-out validation does not decide within one run"
    assert f"Accuracy at the last step, 20 ({rule})" in to_markdown(summary)


def test_mean_k_on_several_test_environments_is_over_their_tokens(tmp_path: Path) -> None:
    folder = moe_run(tmp_path, test_envs=[1, 2])
    (layer,) = summarize(folder).layers
    assert layer.k_test == pytest.approx((1.4 + 2.0) / 2 + 0.2)


def test_a_run_without_test_environment_activates_what_all_need(tmp_path: Path) -> None:
    (layer,) = summarize(moe_run(tmp_path, test_envs=[])).layers
    assert layer.k_test == pytest.approx((1.0 + 1.4 + 2.0) / 3 + 0.2)


def test_missing_measures_are_shown_as_a_dash(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run(RUN)
    accuracies = {"env0_out_acc": 0.5, "env1_in_acc": 0.5, "env1_out_acc": 0.5}
    folder.append("results", {"step": 0, "args": {"test_envs": [1]}, **accuracies})
    summary = summarize(folder)
    assert math.isnan(summary.loss) and math.isnan(summary.activated_parameters)
    markdown = to_markdown(summary)
    assert "| 0 | – | 50.0 % |  |  |" in markdown
    assert f"| {LAYER} | 2 → 2 | 2 | – | – | – |" in markdown
    assert "- speed: – steps/s on cpu" in markdown
    assert "- unfinished: 1 of 21 steps are recorded" in markdown


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run(RUN)
    with pytest.raises(UserError, match=r"expected at least one line in results\.jsonl, found"):
        summarize(folder)


def test_markdown_of_an_moe_run(tmp_path: Path) -> None:
    baseline = {"name": "linear classifier on pixels", "env1_in_acc": 0.412}
    folder = moe_run(tmp_path, baseline=baseline)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "accuracy.png").touch()
    assert (
        to_markdown(summarize(folder))
        == f"""\
# DynMoE on RotatedDigits, tested on 15

Protocol domainbed, selection training-domain validation; seed 7, trial seed 3, hparams seed 0; \
backbone vit_tiny, from scratch

## Accuracy at the selected step, 10 of 21

| environment | train-in | train-out | test-in (reported) | test-out |
| --- | ---: | ---: | ---: | ---: |
| 0 | 90.0 % | 80.0 % |  |  |
| 15 (test) |  |  | **61.0 %** | 50.0 % |
| 30 | 70.0 % | 70.0 % |  |  |
| training mean | 80.0 % | 75.0 % |  |  |

linear classifier on pixels, same split: 41.2 % on 15, test-in

## Experts

| MoE layer | experts | at step 10 | mean k, train | mean k, test \
| unrouted |
| --- | ---: | ---: | ---: | ---: | ---: |
| {LAYER} | 2 → 2 (+2, −2) | 3 | 1.30 | 1.50 | 5.0 % |

experts: start → end of the run; k: experts per token; unrouted: training tokens that chose none; \
all but the first at step 10.

## Run

- parameters: 1,331 (living experts only)
- activated per token: 1,181 (at the mean k on test)
- training loss: 0.5000 (mean over the last window)
- speed: 2.10 steps/s on cpu
- runtime: 2 threads, 32-true, matmul medium, malloc tuned, plain attention, fused optimizer
- peak memory: 0.70 GiB
- figures: accuracy.png

## Figures

![accuracy](figures/accuracy.png)
"""
    )


def test_a_dense_run_says_so_and_has_no_table_of_experts(tmp_path: Path) -> None:
    summary = summarize(dense_run(tmp_path))
    assert summary.total_parameters == summary.activated_parameters == 1000
    for text in (to_markdown(summary), console(summary)):
        assert "1,000, all of them active (no MoE layer)" in text
        assert "MoE layer |" not in text and "Experts" not in text


def test_the_console_shows_the_numbers_of_the_markdown(tmp_path: Path) -> None:
    text = console(summarize(moe_run(tmp_path)))
    for part in ("tested on 15", "61.0 %", "2 → 2 (+2, −2)", "1.50", "1,331", "2.10 steps/s"):
        assert part in text
