"""Calibration data seen by one block after the other, and the quantisation of their layers.

Each linear layer is calibrated on the outputs of the quantised ones before it, in its block and in
the blocks before. Padding does not count. The rows of an expert are those that its layer gives it:
a hook on one of its linear layers takes the layer off its fast path, where experts are called.

Shape suffixes: O outputs, I inputs of a linear layer, N rows of input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe.config.quantize import UNTOUCHED, Quantisation
from dynmoe.errors import Diverged
from dynmoe.layers.moe import MaskedLayer, moe_layers
from dynmoe.layers.quantized import Rounding, gptq, output_error, round_to_nearest
from dynmoe.training.bits import Place, blocks_in, places_in

Inputs = tuple[Any, ...]
"""Positional arguments of the backbone: one calibration batch."""
HESSIANS = 12
"""A pass over the calibration data gathers at most a twelfth of the model's memory, or one layer's;
more take more passes, with the same result."""


class _Enough(Exception):
    """All that a forward pass was for has been seen."""


class Padding(MaskedLayer):
    """Put into a block, it is told of the padding of every call."""

    def of(self, rows: Tensor) -> Tensor:
        """Return the rows [N, I] that are no padding."""
        flat = rows.reshape(-1, rows.shape[-1])
        mask = self.token_mask
        return flat if mask is None or mask.numel() != len(flat) else flat[mask.reshape(-1)]


class Replay:
    """Calibration data on their way through a model, block by block.

    Blocks that are done, and a vision tower, are not computed again: their outputs are kept. Where
    a router hands its logits to the next layer, all are computed again instead.
    """

    def __init__(self, backbone: Any, batches: Sequence[Inputs]) -> None:
        self.backbone = backbone
        self.batches = batches
        self.blocks = list(blocks_in(backbone))
        self.padding = Padding()
        self.keeps = not any(each.router.hands_on for each in moe_layers(backbone).values())
        self._outputs: list[Any] = [None] * len(batches)
        """Of the last block that is done, by batch; those of a vision tower beside them."""
        self._kept: dict[nn.Module, list[Any]] = {}

    def finish(self, number: int) -> None:
        """Keep the outputs of a block as it is now, in the place of those of the one before."""
        if not self.keeps:
            return
        batches = iter(range(len(self.batches)))

        def keep(block: nn.Module, given: Any, output: Any) -> None:
            self._outputs[next(batches)] = output
            raise _Enough

        with hooked([self.blocks[number].register_forward_hook(keep)]):
            self.run(range(len(self.batches)))
        self._kept[self.blocks[number]] = self._outputs

    @torch.no_grad()
    def run(self, batches: Sequence[int]) -> None:
        """Pass batches through the model, until a hook has seen enough."""
        first = self.blocks[0]
        first.add_module("calibration_padding", self.padding)
        try:
            for batch in batches:
                with self._kept_outputs(batch), suppress(_Enough):
                    self.backbone(*self.batches[batch])
        finally:
            del first._modules["calibration_padding"]

    @contextmanager
    def _kept_outputs(self, batch: int) -> Iterator[None]:
        tower = getattr(self.backbone, "vision", None)
        if isinstance(tower, nn.Module) and tower not in self._kept:
            self._kept[tower] = [None] * len(self.batches)
        kept = self._kept if self.keeps else {}
        forwards: dict[nn.Module, Any] = {}
        for module, outputs in kept.items():
            if module is tower and outputs[batch] is None:
                forwards[module] = _remembering(module.forward, outputs, batch)
            else:
                forwards[module] = _returning(outputs[batch])
        try:
            for module, forward in forwards.items():
                module.forward = forward
            yield
        finally:
            for module in forwards:
                del module.forward


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *given, **named: output


def _remembering(forward: Callable[..., Any], outputs: list[Any], batch: int) -> Callable[..., Any]:
    def remembered(*given: Any, **named: Any) -> Any:
        outputs[batch] = forward(*given, **named)
        return outputs[batch]

    return remembered


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Done:
    """The outcome of a quantisation."""

    fallback: list[str] = field(default_factory=list)
    """Layers that no calibration row reached: rounded to nearest."""
    kept_rtn: list[str] = field(default_factory=list)
    """Layers whose outputs GPTQ would have changed more than rounding to nearest: rounded so."""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By layer: the squared error of its outputs on the calibration data over their sum of squares;
    that of rounding to nearest."""


@torch.no_grad()
def round_all(backbone: nn.Module, bits: Mapping[str, int], how: Quantisation) -> Done:
    """Round the linear layers to nearest, in place; no data are needed."""
    for place in places_in(backbone):
        if bits[place.name] != UNTOUCHED:
            rounding = rounding_of(how, bits[place.name])
            place.weight_OI.copy_(round_to_nearest(place.weight_OI, rounding).weight_OI)
    return Done()


def rounding_of(how: Quantisation, bits: int) -> Rounding:
    return Rounding(bits, how.group_size, how.sym, how.mse)


@torch.no_grad()
def calibrate(
    backbone: nn.Module,
    batches: Sequence[Inputs],
    bits: Mapping[str, int],
    how: Quantisation,
    progress: Callable[[int, int], None] = lambda block, blocks: None,
) -> Done:
    """Quantise the linear layers by GPTQ, in place, in the order in which they are called.

    ``backbone``: in evaluation mode, its MoE layers compact. ``bits``: by name, of all layers of
    ``places_in``. ``progress`` is told of each block that is done.

    Raises:
        Diverged: inputs of a layer that are not finite.
    """
    replay, done = Replay(backbone, batches), Done()
    places = [place for place in places_in(backbone) if bits[place.name] != UNTOUCHED]
    size = sum(p.numel() * p.element_size() for p in backbone.parameters())
    for number in range(len(replay.blocks)):
        own = [place for place in places if place.block == number]
        stages = _stages(replay, number, own)
        for index, stage in enumerate(stages):
            later = [place for each in stages[index + 1 :] for shared in each for place in shared]
            for part in _parts(stage, size // HESSIANS):
                _quantise(replay, number, part, later, bits, how, done)
        if number + 1 < len(replay.blocks):
            replay.finish(number)
        progress(number + 1, len(replay.blocks))
    return done


Shared = list[Place]
"""Layers with one input: query, key and value."""


def _stages(replay: Replay, number: int, places: Sequence[Place]) -> list[list[Shared]]:
    """The layers of a block in the order of their calls in the first batch.

    A stage has layers that do not depend on each other: those with one input, and the same ones of
    all experts. Experts that no token chose are put to the others.
    """
    if not places:
        return []
    called: list[tuple[Place, Tensor]] = []

    def note(place: Place) -> Any:
        return lambda module, given: called.append((place, given[0]))

    handles = [place.module.register_forward_pre_hook(note(place)) for place in places]
    handles.append(replay.blocks[number].register_forward_hook(_stop))
    with hooked(handles):
        replay.run([0])
    stages: dict[Any, list[Shared]] = {}
    step_of: dict[str, Any] = {}
    by_input: dict[int, Shared] = {}  # the inputs are alive, so each has an id of its own
    for place, rows in called:
        if place.name in step_of:
            continue  # called twice
        if (shared := by_input.get(id(rows))) is not None:
            shared.append(place)
        else:
            by_input[id(rows)] = shared = [place]
            stages.setdefault(_step(place), []).append(shared)
        step_of[place.name] = _step(shared[0])
    # An expert's layer may share its input with the layer that gives the stage its name.
    steps = {_step(place): step_of[place.name] for place, _ in called}
    for place in places:
        if place.name not in step_of:
            stages.setdefault(steps.get(_step(place), _step(place)), []).append([place])
    return list(stages.values())


def _step(place: Place) -> Any:
    if place.kind != "expert":
        return place.name
    return place.layer, place.name.removeprefix(f"{place.layer}.experts.slots.{place.expert}")


def _stop(*given: Any) -> None:
    raise _Enough


def _parts(stage: Sequence[Shared], most: int) -> Iterator[list[Shared]]:
    """Cut a stage into parts whose Hessians take up to ``most`` bytes."""
    part: list[Shared] = []
    held = 0
    for shared in stage:
        needed = 4 * shared[0].weight_OI.shape[1] ** 2
        if part and held + needed > most:
            yield part
            part, held = [], 0
        part.append(shared)
        held += needed
    yield part


def _quantise(
    replay: Replay,
    number: int,
    part: Sequence[Shared],
    later: Sequence[Place],
    bits: Mapping[str, int],
    how: Quantisation,
    done: Done,
) -> None:
    """Gather the Hessians of a part of a stage, and write its quantised weights."""
    hessians: dict[str, Tensor] = {}

    def gather(place: Place) -> Any:
        def add(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0]
            if place.kind == "expert":
                rows_NI = rows.reshape(-1, rows.shape[-1])
            else:
                rows_NI = replay.padding.of(rows)
            if not len(rows_NI):
                return
            rows_NI = rows_NI.float()
            if place.name not in hessians:
                inputs = rows_NI.shape[1]
                hessians[place.name] = rows_NI.new_zeros(inputs, inputs)
            hessians[place.name].addmm_(rows_NI.t(), rows_NI)

        return add

    layers = {shared[0].layer for shared in part}
    handles = [shared[0].module.register_forward_pre_hook(gather(shared[0])) for shared in part]
    # Experts are called one after the other: the second layer of one before the first of the next.
    handles += [
        place.module.register_forward_pre_hook(_stop)
        for place in later
        if place.kind != "expert" or place.layer not in layers
    ]
    handles.append(replay.blocks[number].register_forward_hook(_stop))
    with hooked(handles):
        replay.run(range(len(replay.batches)))
    for shared in part:
        hessian_II = hessians.pop(shared[0].name, None)
        for place in shared:
            _write(place, hessian_II, rounding_of(how, bits[place.name]), how, done)


def _write(
    place: Place, hessian_II: Tensor | None, rounding: Rounding, how: Quantisation, done: Done
) -> None:
    weight_OI = place.weight_OI.float()
    # NOTE: without any input all columns count as dead, and GPTQ would make the weight 0.
    if hessian_II is None or not hessian_II.diagonal().any():
        done.fallback.append(place.name)
        place.weight_OI.copy_(round_to_nearest(weight_OI, rounding).weight_OI)
        return
    if not hessian_II.isfinite().all():
        raise Diverged(
            f"{place.name}: its inputs on the calibration data are not finite. "
            "Choose another checkpoint=..., or quant.method=rtn, which looks at no data"
        )
    options = (how.percdamp, how.desc_act, how.static_groups)
    found_OI = gptq(weight_OI, hessian_II, rounding, *options).weight_OI
    rtn_OI = round_to_nearest(weight_OI, rounding).weight_OI
    whole = output_error(weight_OI, hessian_II)
    error, rtn_error = (
        output_error(weight_OI - each, hessian_II) / max(whole, 1e-30)
        for each in (found_OI, rtn_OI)
    )
    if error > rtn_error:
        done.kept_rtn.append(place.name)
        found_OI, error = rtn_OI, rtn_error
    done.errors[place.name] = (error, rtn_error)
    place.weight_OI.copy_(found_OI)
