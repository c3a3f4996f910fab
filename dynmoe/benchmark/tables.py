"""Tables for the terminal: of each command, and of the comparison with a baseline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import fmean

from rich import box
from rich.table import Table

from dynmoe.benchmark.results import (
    Change,
    DataRow,
    EpochRow,
    GenerationRow,
    LayerRow,
    StepRow,
    TrainedRow,
)

MIB = 2**20


def of_layers(rows: Sequence[LayerRow]) -> Iterable[Table]:
    """One table for each shape and k."""
    for (shape, k), group in groupby(rows, key=lambda row: (row.shape, row.k)):
        cases = list(group)
        first = cases[0]
        sizes = f"{first.tokens} tokens, dim {first.dim}, hidden {first.hidden}"
        table = _table(
            f"{shape}: {sizes}, {first.experts} experts; k {k:g} (real {first.real_k:.4g});"
            f" {first.rounds} rounds",
            *("case", "ms", "quartiles", "of limit", "quartiles", "GFLOP/s"),
            *("kept\nMiB", "kept,\nx limit", "peak\nMiB", "note"),
        )
        for row in cases:
            table.add_row(
                row.case,
                _short(row.median_ms),
                "–".join(map(_short, row.quartiles_ms)),
                f"{row.ratio:.2f}",
                "{:.2f}–{:.2f}".format(*row.ratio_quartiles),
                _short(row.gflops),
                _short(row.kept_bytes / MIB),
                f"{row.kept_ratio:.2f}",
                _short(row.peak_bytes / MIB),
                _note(row),
            )
        yield table


def _note(row: LayerRow | StepRow) -> str:
    notes = [f"slow: {row.rounds} rounds"] if row.slow else []
    if row.contaminated:
        notes.append(f"{row.contaminated} disturbed")
    return ", ".join(notes)


def of_summary(rows: Sequence[LayerRow]) -> Table:
    """A line for each shape: means over its k."""
    table = _table(
        "Summary, over all k",
        *("shape", "layer,\nof limit", "worst", "router\nshare", "time per row,\nx top_k's"),
        *("kept,\nx limit", "recompute\nkept, x limit"),
    )
    for shape, group in groupby(rows, key=lambda row: row.shape):
        by_case: dict[str, dict[float, LayerRow]] = defaultdict(dict)
        for row in group:
            by_case[row.case][row.k] = row
        layers, top_k = by_case["layer"], by_case["top_k"]
        worst = min(layers.values(), key=lambda row: row.ratio, default=None)
        shares = [r.router_share for r in layers.values() if r.router_share is not None]
        per_row = [layers[k].ms_per_pair / top_k[k].ms_per_pair for k in layers if k in top_k]
        kept = [[r.kept_ratio for r in by_case[c].values()] for c in ("layer", "recompute")]
        table.add_row(
            shape,
            _mean([row.ratio for row in layers.values()], "{:.3f}"),
            "-" if worst is None else f"{worst.ratio:.3f} (k {worst.k:g})",
            _mean(shares, "{:.1%}"),
            _mean(per_row, "{:.3f}"),
            *(_mean(ratios, "{:.2f}") for ratios in kept),
        )
    return table


def of_steps(rows: Sequence[StepRow]) -> Iterable[Table]:
    """One table for training, one for inference."""
    for mode, group in groupby(rows, key=lambda row: row.mode):
        texts = rows[0].tokens_per_s is not None
        table = _table(
            mode,
            *("case", "real k", "samples/s", "tokens/s" if texts else "quartiles", "ms"),
            *("of dense", "quartiles", "ideal", "of\nideal", "params\nM", "used,\nM"),
            *("peak\nMiB", "note"),
        )
        for row in group:
            table.add_row(
                row.case,
                "-" if row.real_k is None else f"{row.real_k:.3f}",
                _short(row.samples_per_s),
                "–".join(map(_short, row.samples_per_s_quartiles))
                if row.tokens_per_s is None
                else _short(row.tokens_per_s),
                _short(row.median_ms),
                f"{row.ratio:.2f}",
                "{:.2f}–{:.2f}".format(*row.ratio_quartiles),
                "-" if row.ideal is None else f"{row.ideal:.2f}",
                "-" if row.of_ideal is None else f"{row.of_ideal:.2f}",
                _short(row.parameters / 1e6),
                _short(row.activated / 1e6),
                "-" if row.peak_bytes is None else _short(row.peak_bytes / MIB),
                _note(row),
            )
        yield table


def of_trained(rows: Sequence[TrainedRow]) -> Iterable[Table]:
    """One table for each problem and mode; the reference is first."""
    for (problem, mode), group in groupby(rows, key=lambda row: (row.problem, row.mode)):
        cases = list(group)
        table = _table(
            f"{problem}: {mode}, batch {cases[0].batch}",
            *("case", "mean k", "samples/s", "quartiles", "ms", f"of {cases[0].setting}"),
            *("quartiles", "peak\nMiB", "rounds", "disturbed"),
        )
        for row in cases:
            table.add_row(
                row.setting,
                "-" if row.mean_k is None else f"{row.mean_k:.3f}",
                _short(row.samples_per_s),
                "–".join(map(_short, row.samples_per_s_quartiles)),
                _short(row.median_ms),
                f"{row.ratio:.2f}",
                "{:.2f}–{:.2f}".format(*row.ratio_quartiles),
                "-" if row.peak_bytes is None else _short(row.peak_bytes / MIB),
                str(row.rounds),
                str(row.contaminated),
            )
        yield table


def of_generation(rows: Sequence[GenerationRow]) -> Iterable[Table]:
    """One table for each problem and reference."""
    for (problem, reference), group in groupby(rows, key=lambda row: (row.problem, row.reference)):
        cases = list(group)
        table = _table(
            f"{problem}: {cases[0].batch} questions at once, {cases[0].new_tokens} new tokens each",
            *("case", "tokens/s", "quartiles", f"of {reference}", "quartiles"),
            *("prompt\nms", "token\nms", "k of\nprompt", "k of\nimage", "k of\nanswer"),
            *("peak\nMiB", "rounds", "disturbed"),
        )
        for row in cases:
            table.add_row(
                row.setting,
                _short(row.tokens_per_s),
                "–".join(map(_short, row.tokens_per_s_quartiles)),
                f"{row.ratio:.2f}",
                "{:.2f}–{:.2f}".format(*row.ratio_quartiles),
                _short(row.prompt_ms),
                _short(row.token_ms),
                *(
                    f"{row.mean_k[part]:.2f}" if part in row.mean_k else "-"
                    for part in ("prompt", "image", "answer")
                ),
                _short(row.peak_bytes / MIB),
                str(row.rounds),
                str(row.contaminated),
            )
        yield table


def of_loaders(rows: Sequence[DataRow]) -> Table:
    """A line for each number of workers."""
    table = _table("Training loader", "workers", "images/s", "ms/image", "CPU ms/image", "images")
    for row in rows:
        cpu = row.cpu_ms_per_image
        table.add_row(
            str(row.workers),
            _short(row.images_per_s),
            f"{row.ms_per_image:.4f}",
            "-" if cpu is None else f"{cpu:.4f}",
            str(row.images),
        )
    return table


def of_epochs(rows: Sequence[EpochRow]) -> Table:
    """A line for each loop; the reference is first."""
    table = _table(
        f"One training epoch, {rows[0].steps} steps, {rows[0].samples} texts",
        *("case", "s", "quartiles", "samples/s", "tokens/s", f"of {rows[0].case}", "quartiles"),
        *("padded", "rounds", "disturbed"),
    )
    for row in rows:
        table.add_row(
            row.case,
            _short(row.seconds),
            "–".join(map(_short, row.seconds_quartiles)),
            _short(row.samples_per_s),
            _short(row.tokens_per_s),
            f"{row.ratio:.2f}",
            "{:.2f}–{:.2f}".format(*row.ratio_quartiles),
            f"{row.padded:.1%}",
            str(row.rounds),
            str(row.contaminated),
        )
    return table


def of_changes(changes: Sequence[Change]) -> Table:
    """Old and new value of each row."""
    labels = list(changes[0].row.labels) if changes else []
    table = _table("Against the baseline", *labels, "old", "new", "change", "note")
    for change in changes:
        show = change.row.compared.form.format
        table.add_row(
            *change.row.labels.values(),
            show(change.old),
            show(change.new),
            f"{change.new / change.old - 1:+.1%}",
            "within noise" if change.within_noise else "",
        )
    return table


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(fmean(values)) if values else "-"


def _short(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        left = column in ("case", "shape", "mode", "note")
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "case")
    return table
