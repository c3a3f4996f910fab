"""MASS's growth by gradient drift as a callback of Lightning."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.adaptation.adapt import Event
from dynmoe.adaptation.callback import RouterCallback, averages_of, part_of, planned_steps
from dynmoe.adaptation.decision import GrowthSchedule, GrowthUnit, one_of
from dynmoe.adaptation.drift import Split
from dynmoe.adaptation.growth import DriftGrowth, check_growth, splittable_layers
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import moe_layers

log = logging.getLogger(__name__)

Check = Literal["eval", "train", "none"]


class MassCallback(RouterCallback):
    """MASS's growth by gradient drift (arXiv 2512.19765) on every adaptive MoE layer.

    It works with any ``LightningModule`` that one optimizer trains, on one device or under DDP.
    Gradients are read between the backward pass and the optimizer step: those of all
    micro-batches, averaged over ranks, unscaled, before Lightning clips them; a step that a
    ``GradScaler`` is going to skip counts nowhere. ``until``, ``warmup``, ``window`` and ``unit``
    are those of ``GrowthSchedule``, the others those of ``DriftGrowth``. The state is in the
    checkpoint. Routers with state are moved too (``RouterCallback``). Averages of weights that
    Lightning's callbacks keep follow the experts. ``model``: as in ``DynMoECallback``.

    ``check``: how the loss of the step is computed with and without the newest expert: a copy of
    the LightningModule, which shares its weights and has its own of all else, runs
    ``training_step`` again, in evaluation mode (``eval``) or in the mode of the training
    (``train``, as the code of MASS), with the same random numbers for both. What the copy logs,
    counts or draws is gone after it. ``none``: the newest expert is never questioned.

    Raises:
        ConfigError: an argument out of its range; at the start of ``fit`` a model or strategy with
            which experts cannot be split (``DriftGrowth``).
    """

    def __init__(
        self,
        until: float = 0.5,
        warmup: float = 0.05,
        window: float = 0.09,
        unit: GrowthUnit = "share",
        p_value: float = 0.01,
        cosine: float = 1e-3,
        patience: int = 3,
        check: Check = "eval",
        check_from: int = 3,
        redundancy_weight: float = 0.01,
        split: Split = "projection_full",
        on_event: Callable[[Event], None] | None = None,
        model: str | None = None,
    ) -> None:
        try:
            self.schedule = GrowthSchedule(until, warmup, window, unit)
            check_growth(p_value, cosine, patience, check_from, redundancy_weight, split)
            one_of("check", check, get_args(Check))
        except ValueError as error:
            raise ConfigError(f"moe.adaptation: {error}") from error
        self.p_value = p_value
        self.cosine = cosine
        self.patience = patience
        self.check = check
        self.check_from = check_from
        self.redundancy_weight = redundancy_weight
        self.split: Split = split
        self.on_event = on_event
        self.model = model
        self._growth: DriftGrowth | None = None
        self._restored: dict[str, Any] | None = None
        self._batches: list[tuple[Any, int]] = []  # of the step under way

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ConfigError(
                "moe.adaptation: growth by drift compares whole gradients, of which FSDP gives "
                "each device a share. Set trainer=ddp or moe.adaptation=null"
            )
        splittable_layers(self._part(pl_module))  # a wrong model is refused before data are read

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        steps = planned_steps(trainer)
        try:
            schedule = self.schedule.in_steps(steps)
        except ValueError as error:
            raise ConfigError(f"moe.adaptation: {error}") from error
        self._growth = DriftGrowth(
            self._part(pl_module),
            trainer.optimizers,
            schedule,
            self.p_value,
            self.cosine,
            self.patience,
            self.check_from,
            self.redundancy_weight,
            self.split,
            self.on_event,
            averages=[self._part(average) for average in averages_of(trainer)],
        )
        reason = schedule.never_splits(steps)
        if reason is None and self._growth.is_over:
            reason = "No expert is ever split: there is no free slot. Raise max_experts"
        if trainer.is_global_zero and reason is not None:
            log.warning(reason)
        if self._restored:  # empty in a checkpoint from before training
            self._growth.load_state_dict(self._restored)
            self._restored = None
        else:
            self._growth.steps = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self._growth is not None
        if self.check != "none" and self._growth.may_check:
            self._batches.append((batch, batch_idx))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        assert self._growth is not None
        scale, counts = 1.0, True
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            counts = _are_finite(optimizer)
            # Fused optimizers unscale gradients within their step.
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                scale = scaler.get_scale()
        loss = None
        if self._batches:
            loss = _StepLoss(trainer, pl_module, self._batches, self.check == "train")
        self._growth.before_step(loss, scale, counts)
        self._batches = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(model=self.model)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._growth is None else self._growth.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _part(self, module: nn.Module) -> nn.Module:
        return part_of(module, self.model, type(self).__name__)


class _StepLoss:
    """Computes the loss of a step's batches again, and leaves no trace."""

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        batches: list[tuple[Any, int]],
        in_training: bool,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.batches = batches
        self.in_training = in_training
        self._copy: L.LightningModule | None = None

    def __call__(self) -> Tensor:
        if self._copy is None:  # experts rarely drift, and then this is called twice
            self._copy = self._copied()
        step = self._copy.training_step
        takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        total = torch.zeros((), dtype=torch.float32, device=self._copy.device)
        with torch.no_grad(), isolate_rng(), self.trainer.precision_plugin.train_step_context():
            for batch, index in self.batches:
                output: Any = step(batch, index) if takes_index else step(batch)
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if loss is not None:  # a micro-batch that the model skipped
                    total = total + loss.float()
        return total

    def _copied(self) -> L.LightningModule:
        # Shared by the copy: weights, which are not written to, and which experts there are.
        kept: list[Tensor] = [*self.module.parameters()]
        kept += [layer.active_E for layer in moe_layers(self.module).values()]
        try:
            copied = copy.deepcopy(self.module, {id(each): each for each in kept})
        except Exception as error:  # whatever a foreign module keeps
            raise ConfigError(
                f"moe.adaptation.check: {type(self.module).__name__} cannot be copied to compute "
                f"the loss of a step again ({error}). Set moe.adaptation.check=none"
            ) from error
        copied.trainer = self.trainer
        if not self.in_training:
            copied.eval()
        for name in ("log", "log_dict"):
            setattr(copied, name, _ignored)
        return copied


def _ignored(*_: Any, **__: Any) -> None:
    """Stands for logging."""


def _are_finite(optimizer: Optimizer) -> bool:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    found = [p.grad.isfinite().all() for p in parameters if p.grad is not None]
    return not found or bool(torch.stack(found).all())
