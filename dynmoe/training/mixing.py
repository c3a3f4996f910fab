"""Data mixing in training: probes of each source, and the sampling weights that follow from them.

Shape suffixes: D sources, L MoE layers, S slots of all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dynmoe.config.mixing import outside
from dynmoe.data.base import TaskData
from dynmoe.data.mixing import Mixing, Mixture, load_distances, moved_weights, numbers_of
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import MoELayer, constant_weights, moe_layers
from dynmoe.records import Record, RunFolder
from dynmoe.seeding import seed_hash
from dynmoe.tasks.base import MoETask

log = logging.getLogger(__name__)

PROBE_BATCH = 32
"""Examples of one forward pass of a probe, at most."""


def mix_data(cfg: DictConfig, data: TaskData, task: MoETask, folder: RunFolder) -> list[L.Callback]:
    """Let the data, which have been set up, be drawn as `mixing` says; the callback that probes.

    Raises:
        ConfigError: data of a single source, a model without the MoE layers that are compared,
            weights or reference losses that are not those of the sources.
    """
    mixing = connect(cfg, data, task.backbone)
    if mixing is None:
        return []
    layers, mixture = compared_layers(task.backbone, mixing), data.mixture
    assert mixture is not None
    if mixing.rule == "dynamic" and len(mixture.names) == 2:
        log.warning(
            "mixing=dynamic: two sources (%s) are equally unlike each other, so their weights move "
            "towards equal ones alone. Add a source, or choose mixing=uniform",
            " and ".join(mixture.names),
        )
    if mixing.every is None:
        return []
    reference = None
    if mixing.rule == "ref_loss":
        reference = reference_losses(mixing.reference, mixture.names)
    return [
        DataMixing(data, mixing, mixing.smoothing(cfg.moe.num_experts), layers, reference, folder)
    ]


def connect(cfg: DictConfig, data: TaskData, backbone: nn.Module | None) -> Mixing | None:
    """Let training batches be drawn by the first weights of `mixing`, if the configuration has it,
    and keep what is probed out of them. For all that reads training batches.

    Raises:
        ConfigError: data of a single source, or weights that are not those of the sources.
    """
    if cfg.get("mixing") is None:
        return None
    mixing = Mixing(**OmegaConf.to_container(cfg.mixing, resolve=True))  # type: ignore[arg-type]
    patches = getattr(getattr(backbone, "patch_embed", None), "num_patches", 1)
    data.mix(mixing, tokens=patches)
    return mixing


def compared_layers(backbone: nn.Module, mixing: Mixing) -> dict[str, MoELayer]:
    """The MoE layers whose loads are compared, by name; {} of a model without any, where the loads
    do not count.

    Raises:
        ConfigError: they do, or `mixing.layers` names one that is not there.
    """
    found = moe_layers(backbone)
    if not found:
        if mixing.rule == "dynamic":
            raise ConfigError(
                "mixing=dynamic: compares how sources use experts, and this model has no MoE layer "
                "that records it. Choose moe=dynmoe or another router of tokens, or mixing=uniform"
            )
        return {}
    names = [*found]
    try:
        return {names[index]: found[names[index]] for index in mixing.layers}
    except IndexError:
        raise ConfigError(outside(len(names), mixing.layers)) from None


def reference_losses(
    reference: str | Mapping[str, float] | Sequence[float] | None, names: Sequence[str]
) -> npt.NDArray[np.float64]:
    """The loss of each source that `mixing.reference` gives: numbers, or the last probe of a run.

    Raises:
        ConfigError: not a finite number for each of `names`, or no run with probes.
    """
    if isinstance(reference, str):
        probes = RunFolder(Path(reference).expanduser()).read("mixing")
        if not probes:
            raise ConfigError(
                f"mixing.reference: {reference} has no losses of sources. Give the folder of a run "
                "with probes, e.g. of mixing=uniform mixing.every=100, or {source: loss}"
            )
        last = dict(zip(probes[-1]["sources"], probes[-1]["loss"], strict=True))
        given: Any = {name: loss for name, loss in last.items() if name in names}
    else:
        given = reference or {}
    losses = numbers_of(given, names)
    if losses is None:
        raise ConfigError(
            f"mixing.reference: expected the loss of each source, {', '.join(names)}, found {given}"
        )
    return np.array(losses, dtype=np.float64)


class DataMixing(L.Callback):
    """Every ``mixing.every`` optimizer steps, and after the last: a probe of each source, which is
    recorded, and the weights that its rule makes of it.

    A probe runs in evaluation mode and leaves no trace: not in the state of routers, the windows of
    the adaptation, the records of routing or random numbers. Loads and losses are summed over
    ranks, so that all have the same weights. The weights are in the checkpoint.
    """

    def __init__(
        self,
        data: TaskData,
        mixing: Mixing,
        c: float,
        layers: Mapping[str, MoELayer],
        reference: npt.NDArray[np.float64] | None,
        folder: RunFolder,
    ) -> None:
        assert data.mixture is not None and mixing.every is not None
        self.data = data
        self.mixture: Mixture = data.mixture
        self.mixing = mixing
        self.every = mixing.every
        self.c = c
        self.layers = layers
        self.reference = reference
        self.folder = folder
        self._step = 0
        self._batches: list[tuple[int, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return self.mixture.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state_dict)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        done = trainer.global_step
        if done > self._step and (done % self.every == 0 or done == trainer.max_steps):
            self.probe(trainer, pl_module)

    def probe(self, trainer: L.Trainer, task: MoETask) -> None:
        """Probe all sources, record it, and move the weights."""
        began, done = time.perf_counter(), trainer.global_step
        loads_LDS, loss_D = self.measured(trainer, task)
        weights = self.mixture.weights
        mixing = self.mixing
        metric, aggregate = mixing.metric, mixing.aggregate
        distances = [load_distances(each, metric, aggregate) for each in loads_LDS]
        delta = np.mean(distances, axis=0) if distances else None
        if self.reference is not None:
            delta = loss_D - self.reference
        moved = weights
        if mixing.rule == "random":
            drawn = np.random.default_rng(seed_hash(self.mixture.seed, "weights", done)).random(
                len(weights)
            )
            moved = drawn / drawn.sum()
        elif mixing.moves:
            assert delta is not None
            moved = moved_weights(weights, delta, mixing.eta, self.c)
        # NOTE: exp may differ in the last digit between machines, and then a draw.
        moved = np.array(trainer.strategy.broadcast(moved.tolist()))
        if mixing.moves:
            self.mixture.move(done, moved)
        if trainer.is_global_zero:
            record: Record = {
                "step": done - 1,
                "sources": self.mixture.names,
                "delta": None if delta is None else delta.tolist(),
                "loss": loss_D.tolist(),
                "load": {
                    name: loads.tolist() for name, loads in zip(self.layers, loads_LDS, strict=True)
                },
                "weights": moved.tolist(),
                "seconds": time.perf_counter() - began,
            }
            self.folder.append("mixing", record)

    def measured(
        self, trainer: L.Trainer, task: MoETask
    ) -> tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
        """Picks of each slot by source, [D, S] of each layer, and mean losses [D], of all ranks."""
        if self._batches is None:
            self._batches = [*self.data.probes(PROBE_BATCH)]
        sources = len(self.mixture.names)
        slots = [layer.max_experts for layer in self.layers.values()]
        # Picks of all layers; then the sum of losses and their number.
        sums = task._sums(sources, sum(slots) + 2)
        with probing(task), trainer.precision_plugin.val_step_context():
            for source, batch in self._batches:
                if batch is None:
                    continue
                losses, tape = task.probe_step(trainer.strategy.batch_to_device(batch))
                loads = [sums.new_zeros(n) for n in slots]
                for load, (name, layer) in zip(loads, self.layers.items(), strict=True):
                    for call in tape[name]:
                        load[list(layer.live)] += call.stats.load_E.to(load.dtype)
                total = losses.to(sums.dtype).sum()
                found = torch.stack([total, torch.full_like(total, losses.numel())])
                sums[source] += torch.cat([*loads, found])
        whole = task.sum_over_ranks(sums).cpu().double().numpy()
        *loads_LDS, losses_D2 = np.split(whole, np.cumsum(slots), axis=1)
        return loads_LDS, losses_D2[:, 0] / losses_D2[:, 1]


@contextmanager
def probing(task: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random numbers are as before at the end."""
    modes = {module: module.training for module in task.modules()}
    task.eval()
    try:
        with isolate_rng(), torch.no_grad(), constant_weights(task):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
