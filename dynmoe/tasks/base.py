"""The LightningModule under every task: routed forward, loss, scores, randomness of each step.

Shape suffixes: B samples or questions, N tokens.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric
from transformers import get_cosine_schedule_with_warmup

from dynmoe.errors import DataError
from dynmoe.layers.moe import (
    Routed,
    aux_loss,
    conflict_loss,
    constant_weights,
    moe_layers,
    record_routing,
)
from dynmoe.metrics.routing import TRAIN, RoutingMeter
from dynmoe.seeding import seed_hash

log = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]
"""Values by set and measure."""


class MoETask(L.LightningModule):
    """A backbone with any number of MoE layers, trained on a task loss plus their auxiliary losses.

    ``scheduler`` is called as ``scheduler(optimizer=..., num_training_steps=...)``. ``env_names``
    are the environments or evaluation sets whose routing is recorded.

    An evaluation scores the sets ``sets`` (the ``env_names``, unless a task says otherwise): a
    task implements ``measures``, and calls ``count_losses`` in ``validation_step``.

    All randomness of a step (dropout, stochastic depth, routing noise) is seeded by (``seed``,
    step, micro-batch, rank). No generator state has to be saved: a resumed run continues as if it
    had never stopped.

    ``nonfinite_step`` is the first optimizer step whose loss was not finite, if there was one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        aux_weight: float,
        seed: int,
        env_names: Sequence[str],
        num_classes: int = 0,
        scheduler: Callable[..., LRScheduler] | None = None,
        parts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if TRAIN in env_names:
            raise DataError(
                f"an evaluation set is called {TRAIN}, which is what records call the training "
                "data; give it another name"
            )
        self.backbone = backbone
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.aux_weight = aux_weight
        self.has_conflicts = any(layer.conflict for layer in moe_layers(backbone).values())
        self.seed = seed
        self.env_names = list(env_names)
        self.sets = list(env_names)
        self.routing = RoutingMeter(backbone, num_classes, parts)
        self._scores: Scores = {}
        # Not buffers: DDP would overwrite them with rank 0's at every forward, and a model in bf16
        # would sum in bf16.
        self._losses = torch.zeros(0, 2)
        self._window = torch.zeros(3)  # sums of losses and auxiliary losses, and their number
        self.nonfinite_step: int | None = None
        self._told = False  # what evaluation depends on
        self._step_weights, self._evaluated_weights = ExitStack(), ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        # Copies are in no step and no evaluation.
        return {
            **super().__getstate__(),
            "_step_weights": ExitStack(),
            "_evaluated_weights": ExitStack(),
        }

    def _apply(self, fn: Any, recurse: bool = True) -> MoETask:
        """Metrics stay in fp32 when the model is converted to bf16 or fp16 (bf16-true, 16-true)."""
        # Also how Lightning leaves a training or an evaluation that an exception ended.
        self._evaluated_weights.close()
        self._step_weights.close()
        super()._apply(fn, recurse)
        for module in self.modules():
            if isinstance(module, Metric):
                # NOTE: a sum of losses in bf16 stops growing after a few hundred steps.
                module._apply(_widened)
        return self

    def routed_forward(self, *inputs: Any, **named: Any) -> tuple[Any, dict[str, list[Routed]]]:
        """The backbone's output and the routing of every MoE layer on the way."""
        with record_routing(self.backbone) as tape:
            output = self.backbone(*inputs, **named)
        return output, tape

    def total_loss(
        self,
        loss: Tensor,
        tape: dict[str, list[Routed]],
        part_BN: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Task loss + ``aux_weight`` * the sum of auxiliary losses + that of token gradient
        conflict, whose value is 0; what training_step returns.

        ``part_BN``: see ``RoutingMeter``.
        """
        aux = aux_loss(tape).to(loss.device)
        self.routing.update(TRAIN, tape, part_BN=part_BN)
        self._add_to_window(loss.detach(), aux.detach())
        self.log("train/loss", loss.detach())
        self.log("train/aux", aux.detach())
        total = loss + self.aux_weight * aux
        if self.has_conflicts:
            total = total + conflict_loss(self.backbone, tape, self.global_step)
        return {"loss": total}

    def source_of(self, batch: Any) -> str:
        """The name in ``env_names`` of the environment or set that an evaluation batch is from."""
        source: str = batch.source
        return source

    def probe_step(self, batch: Any) -> tuple[Tensor, dict[str, list[Routed]]]:
        """Losses [M] of the samples or scored tokens of a training batch, and its routing: nothing
        of it is counted or logged."""
        raise NotImplementedError

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        micro = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(seed_hash(self.seed, "step", self.global_step, micro, self.global_rank))
        if not micro:
            self._step_weights.close()
            self._step_weights.enter_context(constant_weights(self.backbone))

    def optimizer_step(self, *args: Any, **named: Any) -> None:
        """Compute the last micro-batch and step; then weights are others."""
        super().optimizer_step(*args, **named)
        self._step_weights.close()

    def on_validation_start(self) -> None:
        routers = (layer.router for layer in moe_layers(self.backbone).values())
        choosing = next((each for each in routers if each.sees_batch), None)
        if choosing is not None and not self._told and self.trainer.is_global_zero:
            self._told = True
            log.warning(
                "the experts of %s choose among the tokens of a batch: scores depend on "
                "data.eval_batch_size and on the order of the examples",
                type(choosing).__name__,
            )

    def on_validation_epoch_start(self) -> None:
        self._losses = self._sums(len(self.sets), 2)
        # Averages of weights take their place before this hook, and leave it before the other.
        self._evaluated_weights.close()
        self._evaluated_weights.enter_context(constant_weights(self.backbone))

    def _sums(self, *shape: int) -> Tensor:
        # NOTE: float64, so that the order in which batches are added does not show in the mean.
        # Apple's GPUs do not have it.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _add_to_window(self, loss: Tensor, aux: Tensor) -> None:
        # NOTE: a loss that is not finite stays in the sum. torchmetrics' MeanMetric drops it.
        sums = self._sums(3)
        self._window = self._window.to(sums) + torch.stack([loss, aux, torch.ones_like(loss)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of losses since the last evaluation, of all ranks.

        All ranks come here together, or wait for ever: ``Trainer.save_checkpoint`` is called on
        every rank, and has a barrier of its own.
        """
        checkpoint["loss_window"] = self.sum_over_ranks(self._window.to(self._sums(3))).tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_rank == 0:
            window = checkpoint.get("loss_window", [0, 0, 0])
            self._window = torch.tensor(window, dtype=torch.float64)

    def count_losses(self, name: str, losses: Tensor) -> None:
        """Add the losses [M] of single samples or tokens of a set, float32."""
        total = losses.to(self._losses.dtype).sum()
        count = torch.full_like(total, losses.numel())
        self._losses[self.sets.index(name)] += torch.stack([total, count])

    def on_validation_epoch_end(self) -> None:
        self._evaluated_weights.close()
        sums = dict(zip(self.sets, self.sum_over_ranks(self._losses).tolist(), strict=True))
        means = {name: total / count for name, (total, count) in sums.items() if count}
        found = self.measures()
        self._scores = {}
        for name in self.sets:
            scores = dict(found.get(name, {}))
            if name in means:
                scores["loss"] = means[name]
            if scores:
                self._scores[name] = scores
        # Already summed over ranks, so every rank has the same numbers. Loggers refuse some
        # characters that names of sets have (MLflow: "+90%").
        self.log_dict(
            {
                re.sub(r"[^\w./ -]", "_", f"val/{name}/{measure}"): value
                for name, scores in self._scores.items()
                for measure, value in scores.items()
            },
            rank_zero_only=True,
        )

    def measures(self) -> Scores:
        """Measures of the evaluation that just ended but its loss, over all ranks; none of a set
        without a sample."""
        raise NotImplementedError

    def scores(self) -> Scores:
        """Measures of the last evaluation by set: those of the task, and the mean ``loss``.

        A set without a loss (questions without a reference answer) lacks it.
        """
        return {name: dict(scores) for name, scores in self._scores.items()}

    def result(self) -> dict[str, Any]:
        """Entries of the last evaluation in a line of ``results.jsonl``."""
        return {"scores": self.scores()}

    def routing_records(self) -> list[dict[str, Any]]:
        """Routing of the training since the last evaluation, and in that evaluation by set."""
        return self.routing.records([TRAIN, *self.env_names], self.sum_over_ranks)

    def sum_over_ranks(self, counts: Tensor) -> Tensor:
        # NOTE: DDP's reduce writes the sum into the tensor that it gets.
        return self.trainer.strategy.reduce(counts.clone(), reduce_op="sum")

    def example_records(self) -> list[dict[str, Any]]:
        """Single samples of the last evaluation, to be looked at."""
        return []

    def losses_since_last(self) -> dict[str, float]:
        """Mean losses since the last call, over all ranks; NaN if one was, or without a step."""
        loss, aux, count = self.sum_over_ranks(self._window.to(self._sums(3))).tolist()
        self._window = self._sums(3)
        return {
            "loss": loss / count if count else math.nan,
            "aux_loss": aux / count if count else math.nan,
        }

    def new_optimizer(self) -> Optimizer:
        return self.make_optimizer(p for p in self.parameters() if p.requires_grad)

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule of its learning rate over the planned steps."""
        optimizer = self.new_optimizer()
        if self.make_scheduler is None:
            return optimizer
        steps = self.trainer.max_steps
        scheduler = self.make_scheduler(optimizer=optimizer, num_training_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


Decode = Callable[[Sequence[int]], str]


def example_record(
    tokens: Mapping[str, Tensor],
    ids_BN: Tensor,
    tape: Mapping[str, Sequence[Routed]],
    row: int,
    decode: Decode,
) -> dict[str, Any]:
    """The experts of every token of one answered question: row ``row`` of a batch, answers
    ``ids_BN``.

    ``tokens``: the text of every token that was read, None for a patch of an image;
    ``answer_from``: the index in ``tokens`` where the answer begins; ``experts``: by layer and
    token a string of 0 and 1, the living experts that served it. The answer's last token is
    generated but never read.
    """
    real_N = tokens["attention_mask"][row].bool()
    ids = tokens["input_ids"][row][real_N].tolist()
    is_image = tokens["image_mask"][row][real_N].tolist()
    words = [None if image else decode([i]) for i, image in zip(ids, is_image, strict=True)]
    experts = {}
    read = 0
    for name, calls in tape.items():
        prompt, *steps = calls
        served = [prompt.mask[row][real_N]]
        served += [step.mask[row] for step in steps if _is_real(step, row)]
        bits = experts[name] = [token for part in served for token in routed_tokens(part)]
        read = len(bits) - len(words)
    return {
        "tokens": words + [decode([i]) for i in ids_BN[row, :read].tolist()],
        "answer_from": len(words),
        "experts": experts,
    }


def routed_tokens(mask_NE: Tensor) -> list[str]:
    """A string of 0 and 1 for each token: the living experts that served it."""
    return ["".join(str(int(bit)) for bit in token) for token in mask_NE.tolist()]


def _is_real(call: Routed, row: int) -> bool:
    return call.token_mask is None or bool(call.token_mask[row].all())


def cosine_with_warmup(optimizer: Optimizer, num_training_steps: int, warmup: float) -> LRScheduler:
    """LLaVA's schedule: the learning rate rises linearly over the first ``warmup`` share of the
    steps (rounded up, as transformers' ratio is), then falls to 0 along half a cosine."""
    return get_cosine_schedule_with_warmup(
        optimizer, math.ceil(warmup * num_training_steps), num_training_steps
    )
