"""The JSON file of a run: its rows and their conditions; and the comparison with an older file."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from dynmoe.errors import ConfigError
from dynmoe.runtime import machine

# One line of results of each command. Pairs of numbers are quartiles.


class Compared(NamedTuple):
    """What a comparison with a baseline looks at."""

    value: float
    quartiles: tuple[float, float]
    form: str


class Row(Protocol):
    """A dataclass that a file of results can hold and a baseline can be compared by."""

    def __init__(self, **fields: Any) -> None: ...

    @property
    def key(self) -> tuple[str | float, ...]:
        """Equal in two runs for the same measurement."""

    @property
    def labels(self) -> dict[str, str]:
        """What it is called in a table, by column."""

    @property
    def compared(self) -> Compared: ...


@dataclass(frozen=True)
class LayerRow:
    """One case at one shape and k."""

    shape: str
    tokens: int
    dim: int
    hidden: int
    experts: int
    k: float
    real_k: float
    """The mean over the batches of tokens."""
    case: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    """Time of the limit over time of this case, the median over rounds."""
    ratio_quartiles: tuple[float, float]
    gflops: float
    """Useful GFLOP/s: two products forward and four backward over the routed pairs."""
    kept_bytes: int
    """Input rows and what is kept for the backward pass, without the output."""
    kept_ratio: float
    """``kept_bytes`` over the limit's."""
    peak_bytes: int
    """Peak of forward and backward beyond input, weights and incoming gradient."""
    rounds: int
    slow: bool
    """Fewer rounds than asked, see ``timing.SLOW``."""
    contaminated: int
    """Samples during which other processes were busy."""
    router_share: float | None
    """Of ``layer``, if ``experts`` ran too: 1 - experts / layer, the median over rounds."""

    @property
    def key(self) -> tuple[str | float, ...]:
        return self.tokens, self.dim, self.hidden, self.experts, self.k, self.case

    @property
    def labels(self) -> dict[str, str]:
        return {"shape": self.shape, "k": f"{self.k:g}", "case": self.case}

    @property
    def compared(self) -> Compared:
        """Machines drift, so only the limit is compared in time, the others to their own limit."""
        if self.case == "limit":
            return Compared(self.median_ms, self.quartiles_ms, "{:.4g} ms")
        return Compared(self.ratio, self.ratio_quartiles, "{:.3f} of limit")

    @property
    def ms_per_pair(self) -> float:
        return self.median_ms / (self.real_k * self.tokens)


@dataclass(frozen=True)
class StepRow:
    """One model in training or in inference."""

    case: str
    mode: str
    k: float | None
    """Asked for; None where the model has no such choice."""
    real_k: float | None
    """Experts per token, the mean over MoE layers and batches; None without MoE layers."""
    samples_per_s: float
    samples_per_s_quartiles: tuple[float, float]
    median_ms: float
    """Of one step, or of one forward pass."""
    ratio: float
    """Speed over that of the dense model, the median over rounds."""
    ratio_quartiles: tuple[float, float]
    ideal: float | None
    """FLOPs of the dense model over FLOPs of this one; None where they cannot be counted."""
    of_ideal: float | None
    """``ratio`` over ``ideal``."""
    parameters: int
    activated: float
    """Parameters that a token uses."""
    peak_bytes: int | None
    """Of a training step, beyond weights and optimizer state."""
    rounds: int
    slow: bool
    contaminated: int
    tokens_per_s: float | None = None
    """Of texts, padding left out."""

    @property
    def key(self) -> tuple[str | float, ...]:
        return self.mode, self.case

    @property
    def labels(self) -> dict[str, str]:
        return {"mode": self.mode, "case": self.case}

    @property
    def compared(self) -> Compared:
        return Compared(self.samples_per_s, self.samples_per_s_quartiles, "{:.4g} samples/s")


@dataclass(frozen=True)
class TrainedRow:
    """One trained model in training or in inference."""

    run: str
    """Its folder's name."""
    problem: str
    setting: str
    environment: str
    mode: str
    batch: int
    """Samples of a step."""
    median_ms: float
    """Of one step, or of one forward pass."""
    quartiles_ms: tuple[float, float]
    samples_per_s: float
    samples_per_s_quartiles: tuple[float, float]
    ratio: float
    """Speed over that of the reference, the median over rounds."""
    ratio_quartiles: tuple[float, float]
    mean_k: float | None
    """Experts per token, the mean over MoE layers and batches; None without MoE layers."""
    peak_bytes: int | None
    """Of a training step, beyond weights and optimizer state."""
    rounds: int
    contaminated: int


@dataclass(frozen=True)
class GenerationRow:
    """One vision-language model that answers batches of questions, with equally many new tokens.

    ``run`` and ``environment`` are empty unless the model was trained.
    """

    run: str
    """Its folder's name."""
    problem: str
    setting: str
    environment: str
    batch: int
    """Questions answered at once."""
    new_tokens: int
    """Of each answer."""
    median_ms: float
    """Of a batch, from the questions to the last token of the answers."""
    quartiles_ms: tuple[float, float]
    prompt_ms: float
    """Of a batch up to the first new token."""
    prompt_quartiles_ms: tuple[float, float]
    token_ms: float
    """Of a batch for each further token of its answers: the difference of the two medians."""
    tokens_per_s: float
    """New tokens of all answers, of the whole time."""
    tokens_per_s_quartiles: tuple[float, float]
    reference: str
    """The setting that ``ratio`` is over."""
    ratio: float
    """Speed over that of the reference, the median over rounds."""
    ratio_quartiles: tuple[float, float]
    mean_k: dict[str, float]
    """Experts per token of each part (prompt, image, answer), the mean over MoE layers; empty
    without them."""
    peak_bytes: int
    """Beyond the weights."""
    rounds: int
    contaminated: int


@dataclass(frozen=True)
class EpochRow:
    """One way to write the training loop, over one epoch of texts."""

    case: str
    steps: int
    samples: int
    tokens: int
    """Real ones, of all texts."""
    padded: float
    """Share of the positions computed that are padding."""
    seconds: float
    seconds_quartiles: tuple[float, float]
    samples_per_s: float
    tokens_per_s: float
    """Padding left out."""
    ratio: float
    """Tokens per second over those of the plain loop, the median over rounds."""
    ratio_quartiles: tuple[float, float]
    rounds: int
    contaminated: int


@dataclass(frozen=True)
class DataRow:
    """A training loader with one number of workers."""

    workers: int
    images: int
    seconds: float
    images_per_s: float
    ms_per_image: float
    cpu_ms_per_image: float | None
    """CPU time of this process and the workers; None where the workers' cannot be read."""


Facts = dict[str, Any]
R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Conditions:
    """What a time depends on besides the code."""

    machine: Facts
    settings: Facts
    """What ``dynmoe.runtime.settle`` put in force."""
    workload: Facts
    """What all rows have in common."""

    def __str__(self) -> str:
        return ", ".join(
            f"{key} {value}" for facts in vars(self).values() for key, value in facts.items()
        )


def machine_facts(device: torch.device, dtype: str) -> Facts:
    """Processor and PyTorch, as they are now."""
    on_cuda = device.type == "cuda"
    return {
        **machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "dtype": dtype,
    }


def write(
    path: Path, command: Sequence[str], date: str, conditions: Conditions, rows: Sequence[Any]
) -> None:
    """One object: ``command``, ``date``, ``machine``, ``settings``, ``workload``, ``rows``."""
    content = {
        "command": shlex.join(command),
        "date": date,
        **dataclasses.asdict(conditions),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path, kind: type[R]) -> tuple[Conditions, list[R]]:
    """The conditions and the rows of a file that ``write`` wrote.

    Raises:
        ConfigError: it is not there, or something else.
    """
    if not path.is_file():
        raise ConfigError(f"--baseline {path}: there is no such file; --json writes one")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        facts = [dict(content[field.name]) for field in dataclasses.fields(Conditions)]
        return Conditions(*facts), [kind(**row) for row in content["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--baseline {path}: expected a file that this version and command of dynmoe-bench"
            f" wrote ({type(error).__name__}: {error}); measure the baseline again"
        ) from None


def check_equal(old: Facts, new: Facts) -> None:
    """Refuse a baseline that was measured under other conditions.

    Raises:
        ConfigError: naming every fact that differs.
    """
    found = differences(old, new)
    if found:
        raise ConfigError(
            f"--baseline: measured under other conditions: {', '.join(found)}; expected equal"
            " ones. Measure the baseline again here, or give the same options"
        )


def differences(old: Facts, new: Facts) -> list[str]:
    """``key (old value, now new value)`` of every fact that differs."""
    return [
        f"{key} ({old.get(key)}, now {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


class Change(NamedTuple):
    """One row beside the baseline's."""

    row: Row
    old: float
    new: float
    within_noise: bool
    """The quartile ranges overlap."""


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """The rows that both runs have."""
    before = {row.key: row.compared for row in old}
    changes = []
    for row in new:
        if row.key in before:
            (a, (a_low, a_high), _), (b, (b_low, b_high), _) = before[row.key], row.compared
            changes.append(Change(row, a, b, a_low <= b_high and b_low <= a_high))
    return changes
