"""Models that are timed, fresh or trained, and the batches they work on.

Shape suffixes: T tokens, E experts, P pairs, D model width.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from dynmoe.backbones.surgery import blocks_of
from dynmoe.benchmark.candidates import Candidate
from dynmoe.benchmark.cases import SPARSE_KEYS
from dynmoe.benchmark.layer import fit_thresholds
from dynmoe.benchmark.results import Facts
from dynmoe.benchmark.rivals import naive_loop
from dynmoe.data.base import TaskData
from dynmoe.data.images.batches import ImageBatch
from dynmoe.data.vl.batches import ConversationBatch
from dynmoe.errors import ConfigError
from dynmoe.layers import (
    Experts,
    Router,
    Routing,
    TopAnyRouter,
    TopKRouter,
    moe_layers,
    record_routing,
)
from dynmoe.metrics.efficiency import Costs, count
from dynmoe.runtime import set_fused_attention
from dynmoe.training import build as training
from dynmoe.training.instantiation import make
from dynmoe.training.mixing import connect

BATCHES = 8
"""They differ, and with them the loads of the experts, as in training."""
CLASSES, CHANNELS = 10, 3
ENDLESS = 10**9
"""Steps of a run that is never evaluated: a loader stops at each evaluation."""


class LabelledBatch(Protocol):
    """A batch of images, texts, blocks or conversations: ``ImageBatch``, ``TextBatch``,
    ``TokenBatch``, ``ConversationBatch``."""

    @property
    def inputs(self) -> tuple[Any, ...]: ...
    @property
    def label(self) -> Tensor: ...


B = TypeVar("B", bound=LabelledBatch)


class Workload(NamedTuple):
    """Batches that all models of a command work on."""

    batches: Sequence[LabelledBatch]
    backbone_arguments: dict[str, Any]
    """Arguments of a backbone that the data determine."""
    facts: Facts


def noise(cfg: DictConfig, device: torch.device) -> Workload:
    """Return random images: the time of a step depends on loads, not on the weights' values."""
    px, size = cfg.backbone.image_size, cfg.data.batch_size
    batches = random_batches(size, CHANNELS, px, CLASSES, device)
    arguments = {"num_classes": CLASSES, "in_chans": CHANNELS}
    return Workload(batches, arguments, {"px": px, "batch": size})


def of_data(cfg: DictConfig, data: TaskData, device: torch.device) -> Workload:
    """Training batches of the configured texts or conversations.

    Raises:
        UserError: data that cannot be read.
    """
    batches = training_batches(data, device, cfg)
    facts = {
        "data": data.name,
        "max_length": cfg.data.get("max_length", cfg.data.get("length")),
        "batch": cfg.data.batch_size,
        **token_facts(batches),
    }
    return Workload(batches, data.backbone_arguments, facts)


def random_batches(
    size: int, channels: int, px: int, classes: int, device: torch.device
) -> list[ImageBatch]:
    torch.manual_seed(1)
    none = torch.zeros(size, dtype=torch.long, device=device)
    return [
        ImageBatch(
            torch.randn(size, channels, px, px).to(device),
            torch.randint(classes, (size,)).to(device),
            env=none,
            split=none,
        )
        for _ in range(BATCHES)
    ]


def data_of(cfg: DictConfig, workers: int = 0) -> TaskData:
    """Build the data module of ``cfg``, whose training batches go on without an evaluation.

    Raises:
        UserError: data that cannot be built.
    """
    if "workers" in cfg.data:
        cfg.data.workers = workers
    return training.build_data(cfg, steps=ENDLESS, eval_every=ENDLESS, accumulate=1)


def training_batches(
    data: TaskData, device: torch.device, cfg: DictConfig | None = None
) -> list[Any]:
    """Return the first batches that are trained on; ``cfg`` tells whether sources are mixed.

    Raises:
        UserError: data that cannot be read.
    """
    data.setup()
    if cfg is not None:
        connect(cfg, data, None)
    data.repeat_evaluation_of(0)  # go on after step 0, which an evaluation follows
    batches = islice(data.train_dataloader(), BATCHES)
    return [move_data_to_device(batch, device) for batch in batches]


def calls_of_sample(batches: Sequence[LabelledBatch]) -> int:
    """Return how many calls a sample of a time needs, so that all cases do the same work.

    It is one where all batches have one shape, else a pass over all of them.
    """
    shapes = {tuple(x.shape for x in tree_leaves(batch.inputs)) for batch in batches}
    return 1 if len(shapes) == 1 else len(batches)


def largest(batches: Sequence[B]) -> B:
    """Return the first batch with the most positions: its step needs most memory."""
    return max(batches, key=lambda batch: sum(x.numel() for x in tree_leaves(batch.inputs)))


def token_facts(batches: Sequence[LabelledBatch]) -> Facts:
    """Return means over the batches; ``tokens`` are real ones, patches included.

    Conversations also have ``images`` and ``scored``, the tokens with a loss. Plain images have
    none.
    """
    tokens = tokens_of(batches)
    if tokens is None:
        return {}
    facts: Facts = {"tokens": round(tokens), "padded": round(padded_share(batches), 3)}
    conversations = [batch for batch in batches if isinstance(batch, ConversationBatch)]
    if conversations:
        facts["images"] = round(fmean(len(each.tokens["images"]) for each in conversations), 1)
        facts["scored"] = round(fmean(len(each.scored[0]) for each in conversations))
    return facts


def tokens_of(batches: Sequence[LabelledBatch]) -> float | None:
    """Return the mean number of real tokens of a batch; None for images."""
    if isinstance(batches[0], ImageBatch):
        return None
    return fmean(int(mask.sum()) for mask in map(_mask, batches))


def _mask(batch: LabelledBatch) -> Tensor:
    """The attention mask [B, N]; of ones where a batch has none."""
    tokens: dict[str, Tensor] = batch.inputs[0]
    found = tokens.get("attention_mask")
    return torch.ones_like(tokens["input_ids"]) if found is None else found


def padded_share(batches: Sequence[LabelledBatch]) -> float:
    """Return the share of padding in the positions that are computed."""
    masks = list(map(_mask, batches))
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def costs_of_sample(
    model: nn.Module,
    batches: Sequence[LabelledBatch],
    outside: dict[tuple[Any, ...], float] | None = None,
) -> Costs:
    """Return ``efficiency.count`` of a sample, the mean over the ``batches``.

    MoE layers compute real tokens alone, all other modules the padding too. ``outside`` keeps the
    FLOPs outside MoE layers by the names of these and by shape: models that share one differ in
    nothing but the layers of equal names.
    """
    tokens = tokens_of(batches)
    if tokens is None:
        return count(model, *tree_map(lambda x: x[:1], batches[0].inputs))
    outside, names = {} if outside is None else outside, tuple(moe_layers(model))
    costs: Costs | None = None
    total = 0.0
    for batch in batches:
        # Without an attention mask the costs of a model depend on shapes alone.
        given, *others = batch.inputs
        inputs: Any = ({k: v for k, v in given.items() if k != "attention_mask"}, *others)
        times = 1
        if not isinstance(batch, ConversationBatch):  # all of its texts have one length
            inputs, times = tree_map(lambda x: x[:1], inputs), len(batch.label)
        key = names, tuple(x.shape for x in tree_leaves(inputs))
        if costs is None or key not in outside:
            counted = count(model, *inputs)
            if counted["flops"] is None:
                return counted
            costs, outside[key] = costs or counted, counted["flops"]["other"]
        total += times * outside[key]
    assert costs is not None
    samples = sum(len(batch.label) for batch in batches)
    tokens *= len(batches) / samples
    layers = costs["flops"]["layers"].items()
    return {
        **costs,
        "flops": {
            "other": total / samples,
            "layers": {name: {**layer, "tokens": tokens} for name, layer in layers},
        },
    }


def model_name(backbone: DictConfig) -> str:
    """Return a folder's name, a name of timm or of the hub, or an architecture."""
    path = backbone.get("path")
    return Path(path).name if path else backbone.model or backbone.architecture


# Models.


PLUGINS: dict[str, Callable[[str], Precision]] = {
    "32-true": lambda device: Precision(),
    "bf16-mixed": partial(MixedPrecision, "bf16-mixed"),
    "bf16-true": lambda device: HalfPrecision("bf16-true"),
}
"""Lightning's, by ``trainer.precision``: functions of the type of device."""


@dataclass
class TimedModel:
    """A model to time."""

    name: str
    """Its setting or case, with its precision where there are several."""
    model: Any
    identity: Facts
    """Fields of its rows that identify it."""
    loss: Callable[[Any], Tensor]
    """The training loss of a batch."""
    new_optimizer: Callable[[], Optimizer]
    precision: Precision
    first: tuple[str, str] | None = None
    """Of several precisions the first one, and the name of the same case in it."""
    costs: Costs | None = field(default=None, repr=False)
    """``costs_of_sample`` of a fresh model, counted before its layers are compact."""


def trained(
    group: Sequence[Candidate],
    data: TaskData,
    fused_attention: bool,
    device: torch.device,
    precision: str,
) -> list[TimedModel]:
    """Load the models of runs of one problem from their checkpoints. ``data`` is the first one's.

    Raises:
        UserError: a checkpoint that does not fit its configuration.
    """
    # Tasks log their losses to a trainer, and here is none.
    warnings.filterwarnings("ignore", message=r".*`self\.trainer` reference is not registered.*")
    models, plugin = [], PLUGINS[precision](device.type)
    for run, cfg, checkpoint in group:
        task, _ = training.load(cfg, data, fused_attention, checkpoint)
        plugin.convert_module(task.to(device))
        identity = {
            "run": run.folder.path.name,
            "problem": ", ".join(run.problem),
            "setting": run.setting,
            "environment": run.environment,
        }

        def loss(batch: LabelledBatch, task: Any = task) -> Any:
            return task.training_step(batch, 0)["loss"]

        models.append(
            TimedModel(run.setting, task.backbone, identity, loss, task.new_optimizer, plugin)
        )
    return models


def fresh(
    cfg: DictConfig,
    work: Workload,
    cases: Sequence[str],
    ks: Sequence[float],
    given_layers: bool,
    fused_attention: bool,
    precisions: Sequence[str],
) -> tuple[list[TimedModel], Facts]:
    """Build the ``cases`` of ``cases.step_cases``, all of them in each precision; return them and
    facts they have in common.

    ``given_layers``: MoE layers are where the configuration says, else in every second block, 1,
    3, 5, ... Routers are fitted in the precision they are used in.

    Raises:
        ConfigError: a backbone that cannot be built, MoE layers nowhere or that do not fit.
    """
    device = work.batches[0].label.device

    def backbone(left_out: Sequence[str] = ()) -> nn.Module:
        torch.manual_seed(0)
        node = copy.deepcopy(cfg.backbone)
        for key in left_out:
            node[key] = None
        made: nn.Module = make(node, **work.backbone_arguments)
        set_fused_attention(made, fused_attention)
        return made.to(device)

    dense = backbone()
    whole = backbone(SPARSE_KEYS) if "sparse" in cases else dense
    host = getattr(dense, "language_model", dense)
    layers = cfg.moe.layers if given_layers else list(range(1, len(blocks_of(host)[0]), 2))
    if layers == "none" or not len(layers):
        raise ConfigError(f"moe.layers={layers}: expected some blocks with MoE layers, e.g. [0]")
    layers = layers if isinstance(layers, str) else list(layers)
    facts = {
        "model": model_name(cfg.backbone),
        "options": str(cfg.backbone.options),
        **{key: str(cfg.backbone[key]) for key in SPARSE_KEYS if cfg.backbone.get(key) is not None},
        **work.facts,
        "moe_layers": layers,
        "experts": cfg.moe.num_experts,
    }
    k_of = {f"dynmoe {k:g}": k for k in ks}
    models = []
    for precision in precisions:
        plugin = PLUGINS[precision](device.type)
        own = plugin.convert_module(copy.deepcopy(dense))
        batches = [plugin.convert_input(batch) for batch in work.batches]
        built = build_models(cfg, own, layers, cases, ks, batches, plugin)
        if whole is not dense:
            built["dense"] = plugin.convert_module(copy.deepcopy(whole))
        models += [
            TimedModel(
                f"{name}, {precision}" if len(precisions) > 1 else name,
                model,
                {"case": name, "k": k_of.get(name), "precision": precision},
                partial(classification_loss, model, cfg.moe.aux_weight),
                partial(torch.optim.AdamW, model.parameters(), fused=True),
                plugin,
                (precisions[0], f"{name}, {precisions[0]}") if len(precisions) > 1 else None,
            )
            for name, model in built.items()
        ]
    return models, facts


def classification_loss(model: nn.Module, aux_weight: float, batch: LabelledBatch) -> Tensor:
    """Cross-entropy, for numbers the squared error, and the auxiliary losses."""
    with record_routing(model) as tape:
        output = model(*batch.inputs)
    if isinstance(batch, ConversationBatch):
        value = F.cross_entropy(output.float(), batch.scored[1])
    elif batch.label.is_floating_point():
        value = F.mse_loss(output.squeeze(1), batch.label)
    else:  # of classes, or of the next tokens of blocks
        value = F.cross_entropy(output.flatten(0, -2), batch.label.flatten())
    for calls in tape.values():
        value = value + aux_weight * sum(call.aux for call in calls)
        # Its weight does not show in the time.
        for conflict in (call.conflict for call in calls if call.conflict is not None):
            value = value + conflict
    return value


def build_models(
    cfg: DictConfig,
    dense: nn.Module,
    layers: list[int] | str,
    cases: Sequence[str],
    ks: Sequence[float],
    batches: Sequence[LabelledBatch],
    plugin: Precision,
) -> dict[str, nn.Module]:
    """Build the ``cases``, fitted to k on the first batch, or on all where shapes differ.

    Raises:
        ConfigError: MoE layers that do not fit, or a router without thresholds.
    """
    moe, device = cfg.moe, next(dense.parameters()).device
    is_fresh = moe.init == "fresh" or (moe.init == "auto" and not cfg.backbone.pretrained)
    top_any: Any = make(moe.router) if moe.router else None
    if getattr(top_any, "func", None) is not TopAnyRouter:
        raise ConfigError(
            f"moe={moe.name}: expected the top-any router, as in moe=dynmoe; top-1 and top-2 are"
            " cases besides it"
        )

    def with_router(router: Callable[[int, int], Router], slots: int) -> nn.Module:
        torch.manual_seed(0)  # equal experts and directions in all cases of equal routers
        model = copy.deepcopy(dense)
        init = "fresh" if is_fresh else "copy"
        training.add_layers(moe, model, router=router, max_experts=slots, layers=layers, init=init)
        return plugin.convert_module(model.to(device))

    def top_k(k: int) -> nn.Module:
        return with_router(partial(TopKRouter, top_k=k), moe.num_experts)

    def dynmoe(k: float, experts: Callable[[Experts], Experts] = lambda own: own) -> nn.Module:
        model = with_router(top_any, moe.max_experts)
        for layer in moe_layers(model).values():
            layer.experts = experts(layer.experts)
        with plugin.forward_context():
            fit(model, k, batches[: calls_of_sample(batches)])
        return model

    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: dense,
        "sparse": lambda: dense,
        "top-1": partial(top_k, 1),
        "top-2": partial(top_k, 2),
        **{f"dynmoe {k:g}": partial(dynmoe, k) for k in ks},
        "loop": partial(dynmoe, ks[0], Loop),
        "all then mask": partial(dynmoe, ks[0], AllThenMask),
    }
    models = {case: makers[case]() for case in cases}
    parts = cfg.task.module.get("trains")
    if parts is not None:
        from dynmoe.backbones.vlm import train_only  # imports transformers

        for model in models.values():
            train_only(model, parts)  # type: ignore[arg-type]
    return models


@torch.no_grad()
def fit(model: nn.Module, k: float, batches: Sequence[LabelledBatch]) -> None:
    """Fit the thresholds of one layer after the other: its input depends on those before it."""
    for layer in moe_layers(model).values():
        seen: list[Tensor] = []

        def see(layer: Any, inputs: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            x, mask = inputs[0], layer.token_mask  # the mask leaves padding out
            seen.append((x if mask is None else x[mask]).reshape(-1, layer.dim))

        with layer.register_forward_pre_hook(see):
            for batch in batches:
                model(*batch.inputs)
        assert isinstance(layer.router, TopAnyRouter)
        fit_thresholds(layer.router, layer.live, torch.cat(seen), k)


class Loop(Experts):
    """``rivals.naive_loop`` over the slots."""

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.slots = experts.slots

    def forward(self, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
        def one(e: int, x_PD: Tensor) -> Tensor:
            return self.slots[live[e]](x_PD)

        return naive_loop(x_TD, routing.weights_TE, routing.mask_TE, one)


class AllThenMask(Loop):
    """Every expert on every token, then the weights, which are 0 outside the mask."""

    def forward(self, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
        out_TED = torch.stack([self.slots[slot](x_TD) for slot in live], dim=1)
        weights_T1E = (routing.weights_TE * routing.mask_TE)[:, None].to(out_TED.dtype)
        return (weights_T1E @ out_TED).squeeze(1).to(x_TD.dtype)
