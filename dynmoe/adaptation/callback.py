"""State of routers and the adaptive process as callbacks of Lightning."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dynmoe.adaptation.adapt import Adaptation, Event, adaptive_layers, check_arguments
from dynmoe.adaptation.decision import Schedule, Unit
from dynmoe.adaptation.updates import RouterUpdates, layers_with_state
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import MoELayer, NewExpert, moe_layers

log = logging.getLogger(__name__)


class RouterCallback(L.Callback):
    """Moves the state of routers after each optimizer step (``RouterUpdates``).

    It works with any ``LightningModule``, and does nothing for one whose routers have no state.
    The state is in the model's buffers, and so in its checkpoints: those that are written between
    optimizer steps lack the micro-batches since the last one, whose gradients Lightning does not
    keep either. ``DynMoECallback`` moves it too: a training has one of the two.
    """

    _process: RouterUpdates | Adaptation | None = None
    _step = 0
    _loss: Tensor | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        if layers_with_state(pl_module):
            self._process = RouterUpdates(pl_module, trainer.optimizers, planned_steps(trainer))
            self._process.steps = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):  # a sum: one micro-batch spoils the whole step
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if trainer.global_step > self._step and self._process is not None:
            self._process.step(self._loss)
            self._loss = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()  # teardown is left out then

    def _close(self) -> None:
        if self._process is not None:
            self._process.close()


class DynMoECallback(RouterCallback):
    """DynMoE's adaptive process (arXiv 2405.14297, Algorithm 1) on every adaptive MoE layer.

    It works with any ``LightningModule``: the layers themselves report what they route in training,
    and evaluation never counts. ``training_step`` adds the auxiliary loss to its own::

        with record_routing(self) as tape:
            loss = F.cross_entropy(self.net(x), y)
        return loss + 0.01 * aux_loss(tape)

    ``model`` names the attribute whose layers are adapted (``"net"``, ``"student.encoder"``); None
    finds them anywhere in the module. Events call a layer by its name in that attribute, or in the
    only one that has MoE layers. Two callbacks in one Trainer need two such names, or Lightning
    refuses "more than one stateful callback". Experts change after the optimizer step, never
    between a forward and its backward; windows count optimizer steps, so gradient accumulation does
    not move them; all ranks make the same change (``Adaptation``, which has the other arguments).
    Averages of weights that Lightning's callbacks keep follow the experts. The state is in the
    checkpoint. Routers with state are moved too, those of layers that are not adapted included.

    Raises:
        ConfigError: a window that cannot be, an argument that is none of its choices; at the start
            of ``fit`` a model that cannot be adapted (``Adaptation``).
    """

    def __init__(
        self,
        start: float,
        length: float,
        period: float,
        unit: Unit = "step",
        min_experts: int = 1,
        init: NewExpert = "copy_most_used",
        reset_moments: bool = True,
        on_event: Callable[[Event], None] | None = None,
        model: str | None = None,
        remove_below: float = 0.0,
    ) -> None:
        try:
            self.schedule = Schedule(start, length, period, unit)
            check_arguments(min_experts, init, reset_moments, remove_below)
        except ValueError as error:
            raise ConfigError(f"moe.adaptation: {error}") from error
        self.min_experts = min_experts
        self.init: NewExpert = init
        self.reset_moments = reset_moments
        self.remove_below = remove_below
        self.on_event = on_event
        self.model = model
        self._process: Adaptation | None = None
        self._restored: dict[str, Any] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        adaptive_layers(self._part(pl_module))  # a wrong model is refused before data are read

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        schedule = self.schedule
        if schedule.unit == "epoch":
            schedule = schedule.in_steps(_steps_per_epoch(trainer))
        self._process = Adaptation(
            self._part(pl_module),
            trainer.optimizers,
            schedule,
            self.min_experts,
            self.init,
            self.reset_moments,
            self.on_event,
            averages=[self._part(average) for average in averages_of(trainer)],
            root=trainer.model,
            num_steps=planned_steps(trainer),
            remove_below=self.remove_below,
        )
        if trainer.is_global_zero and (reason := schedule.never_updates(planned_steps(trainer))):
            log.warning(reason)
        if self._restored:  # empty in a checkpoint from before training
            self._process.load_state_dict(self._restored)
            self._restored = None
        else:
            self._process.steps = trainer.global_step

    @property
    def state_key(self) -> str:
        return self._generate_state_key(model=self.model)  # one callback for each of two models

    def state_dict(self) -> dict[str, Any]:
        return {} if self._process is None else self._process.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _part(self, module: nn.Module) -> nn.Module:
        return part_of(module, self.model, type(self).__name__)


def part_of(module: nn.Module, path: str | None, asks: str) -> nn.Module:
    """The attribute ``path`` of a LightningModule; None: the only one that has MoE layers, else
    the whole.

    Raises:
        ConfigError: there is no such module, for the callback that ``asks``.
    """
    owners = {name.partition(".")[0] for name in moe_layers(module)}
    if path is None:
        # Short names where there is one model, whatever its attribute is called.
        (path,) = owners if len(owners) == 1 else ("",)
        if isinstance(getattr(module, path, None), MoELayer):
            path = ""
    part: Any = module
    for word in path.split(".") if path else ():
        part = getattr(part, word, None)
    if isinstance(part, nn.Module):
        return part
    raise ConfigError(
        f"{asks}(model={path!r}): {type(module).__name__} has no such module. Its MoE "
        f"layers are in {', '.join(sorted(owners)) or 'none'}; leave `model` out to find them."
    )


def averages_of(trainer: L.Trainer) -> list[nn.Module]:
    """The averaged copies of the LightningModule that other callbacks keep.

    Raises:
        ConfigError: one of them averages the set of experts itself, which PyTorch cannot.
    """
    found: list[nn.Module] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            continue
        average: nn.Module | None = callback._average_model
        if isinstance(average, AveragedModel):
            if average.use_buffers and average.avg_fn is None:
                # torch/optim/swa_utils.py subtracts them: there is no difference of bool tensors.
                raise ConfigError(
                    f"{type(callback).__name__}: the buffers of MoE layers say which experts live "
                    "and have no mean. Set use_buffers=False, which copies buffers."
                )
            average = average.module
        if average is not None:
            found.append(average)
    return found


def planned_steps(trainer: L.Trainer) -> float:
    """Return the optimizer steps of the whole training; infinite where Lightning cannot tell."""
    try:
        return trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes between epochs
        return math.inf


def _steps_per_epoch(trainer: L.Trainer) -> int:
    """Return optimizer steps: the data module's number if it has one, else the loader's."""
    own = getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
    if own is not None:
        return max(1, int(own))
    if math.isinf(trainer.num_training_batches):
        raise ConfigError(
            "moe.adaptation.unit=epoch: the training loader has no end; give the window in steps "
            "(unit=step), or the data module an attribute steps_per_epoch"
        )
    return max(1, int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
