"""The LightningModule under every task: forward with a routing tape, loss, per-step randomness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from transformers import get_cosine_schedule_with_warmup

from dynmoe.layers.moe import Routed, record_routing
from dynmoe.metrics.routing import TRAIN, RoutingMeter
from dynmoe.seeding import seed_hash


class MoETask(L.LightningModule):
    """A backbone with any number of MoE layers, trained on a task loss plus their auxiliary losses.

    ``scheduler`` is called as ``scheduler(optimizer=..., num_training_steps=...)``.

    All randomness of a step (dropout, stochastic depth, routing noise) is seeded by (``seed``,
    step, micro-batch, rank). Nothing of it has to be saved: a resumed run goes on as if never
    stopped.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        aux_weight: float,
        seed: int,
        num_classes: int = 0,
        scheduler: Callable[..., LRScheduler] | None = None,
        parts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.aux_weight = aux_weight
        self.seed = seed
        self.routing = RoutingMeter(backbone, num_classes, parts)
        self.mean_loss = MeanMetric()
        self.mean_aux = MeanMetric()

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
        """Task loss + ``aux_weight`` * the sum of auxiliary losses; what training_step returns.

        ``routing`` goes to the callbacks that record or adapt. ``part_BN``: see ``RoutingMeter``.
        """
        aux = torch.zeros((), device=loss.device)
        for calls in tape.values():
            for call in calls:
                aux = aux + call.aux
        self.routing.update(TRAIN, tape, part_BN=part_BN)
        self.mean_loss.update(loss.detach())
        self.mean_aux.update(aux.detach())
        self.log("train/loss", loss.detach())
        self.log("train/aux", aux.detach())
        routing = {name: [call.stats for call in calls] for name, calls in tape.items()}
        return {"loss": loss + self.aux_weight * aux, "routing": routing}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        micro = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(seed_hash(self.seed, "step", self.global_step, micro, self.global_rank))

    def scores(self) -> dict[str, float]:
        """Measures of the last evaluation, by their names in ``results.jsonl``."""
        raise NotImplementedError

    def routing_records(self) -> list[dict[str, Any]]:
        """Routing of the training since the last evaluation, and in that evaluation by source."""
        raise NotImplementedError

    def example_records(self) -> list[dict[str, Any]]:
        """Single samples of the last evaluation, to be looked at."""
        return []

    def losses_since_last(self) -> dict[str, float]:
        """Mean losses since the last call, over all ranks."""
        means = {
            "loss": self.mean_loss.compute().item(),
            "aux_loss": self.mean_aux.compute().item(),
        }
        self.mean_loss.reset()
        self.mean_aux.reset()
        return means

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


# One answered question, token by token, with the experts that each token used: for pictures.

Decode = Callable[[Sequence[int]], str]


def example_record(
    tokens: Mapping[str, Tensor],
    ids_BN: Tensor,
    tape: Mapping[str, Sequence[Routed]],
    row: int,
    decode: Decode,
) -> dict[str, Any]:
    """What is recorded of the question in row ``row`` of a batch and of its answer ``ids_BN``.

    ``tokens``: what every token that was read says, None for a patch of an image; ``answer_from``:
    where the answer begins in them; ``experts``: by layer and token a string of 0 and 1, the
    living experts that served it. The answer's last token is said but never read.
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
        bits = ["".join(str(int(bit)) for bit in token) for part in served for token in part]
        experts[name] = bits
        read = len(bits) - len(words)
    return {
        "tokens": words + [decode([i]) for i in ids_BN[row, :read].tolist()],
        "answer_from": len(words),
        "experts": experts,
    }


def _is_real(call: Routed, row: int) -> bool:
    return call.token_mask is None or bool(call.token_mask[row].all())


# The schedule of LLaVA's learning rate.


def cosine_with_warmup(optimizer: Optimizer, num_training_steps: int, warmup: float) -> LRScheduler:
    """Up over the first ``warmup`` share of the steps (rounded up, as transformers' ratio is), then
    down to 0 along half a cosine."""
    return get_cosine_schedule_with_warmup(
        optimizer, math.ceil(warmup * num_training_steps), num_training_steps
    )
