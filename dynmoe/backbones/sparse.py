"""Sparse-Tuning of Vision Transformers (arXiv 2405.14700, liuting20/Sparse-Tuning): blocks that
leave out patches the class token attends to least, and adapters beside their FFNs.

Shape suffixes: B images, N tokens, P patches (tokens after the class and register tokens), K kept
ones, H heads, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.errors import ConfigError

Depths = Literal["quarters"] | Sequence[int]

PLAIN = (
    "Vision Transformers of timm with plain blocks, e.g. vit_small_patch16_224, "
    "deit_small_patch16_224 or vit_small_patch14_dinov2"
)


def tune(
    vit: nn.Module,
    token_sparsify: Mapping[str, Any] | None,
    adapter: Mapping[str, Any] | None,
    pretrained: bool,
) -> None:
    """Give a ViT of timm fewer tokens in its later blocks, adapters, or both, in place.

    Parts of blocks keep their names. ``token_sparsify``: arguments of ``sparse_depths``;
    ``adapter``: of ``add_adapters``. MoE layers that come later take the place of FFNs as ever,
    see the tokens that are left, and are trained whole.

    Raises:
        ConfigError: an option that is not there or does not fit, a model without a class token or
            with blocks or attention of another kind.
    """
    host: Any = vit
    starts = quarters(len(host.blocks))
    if token_sparsify is not None:
        _check_blocks(host, "backbone.token_sparsify", attention=True)
        try:
            starts = sparsify_tokens(host, **token_sparsify)
        except TypeError as error:
            raise ConfigError(f"backbone.token_sparsify: {error}") from error
    if adapter is not None:
        _check_blocks(host, "backbone.adapter", attention=False)
        try:
            add_adapters(host, starts, pretrained=pretrained, **adapter)
        except TypeError as error:
            raise ConfigError(f"backbone.adapter: {error}") from error


def _check_blocks(vit: Any, key: str, attention: bool) -> None:
    kind = type(vit).__name__
    if attention and getattr(vit, "cls_token", None) is None:
        raise ConfigError(
            f"{key}: patches are chosen by the attention of the class token, which this {kind} "
            "lacks. Choose a backbone.model that has one, e.g. vit_small_patch16_224, or set "
            f"{key}=null"
        )
    known = (Block, ResPostBlock, SparseBlock)
    found = next((block for block in vit.blocks if type(block) not in known), None)
    if found is not None or not isinstance(vit, VisionTransformer):
        other = kind if found is None else f"{kind} with a {type(found).__name__}"
        raise ConfigError(
            f"{key}: works in {PLAIN}; found a {other}, whose tokens have other positions or paths."
            f" Choose another backbone.model or set {key}=null"
        )
    unlike = next((b.attn for b in vit.blocks if type(b.attn) is not Attention), None)
    if attention and unlike is not None:
        raise ConfigError(
            f"{key}: works in {PLAIN}; found a {type(unlike).__name__}, whose class token attends "
            f"in another way. Choose another backbone.model or set {key}=null"
        )


def quarters(depth: int) -> list[int]:
    """Return the first blocks of the last three quarters: 3, 6 and 9 of 12."""
    return sorted({depth * part // 4 for part in (1, 2, 3)} - {0})


def sparsify_tokens(
    vit: Any,
    keep: float | Sequence[float] = 0.7,
    blocks: Depths = "quarters",
    fuse: bool = True,
    shrink_start: int = 0,
    shrink_steps: int = 0,
) -> list[int]:
    """Put a ``TokenSparsifier`` into some ``blocks``, in place; return their indices.

    ``blocks``: indices from 0, or ``quarters``. ``keep``: a share above 0, or one for each of them.
    ``fuse``: the other patches become one token; without, they are gone.
    ``shrink_start``, ``shrink_steps``: see ``TokenSparsifier.go_to``; 0 steps: ``keep`` from the
    start, as in the official code, which reads these options and does not use them.

    Raises:
        ConfigError: a block that is not there, a share that is none, or not as many.
    """
    key, depth = "backbone.token_sparsify", len(vit.blocks)
    places = quarters(depth) if isinstance(blocks, str) else list(blocks)
    if places != sorted(set(places)) or not all(0 <= place < depth for place in places):
        raise ConfigError(
            f"{key}.blocks: expected rising indices of this backbone's blocks, 0 to {depth - 1}, "
            f"or quarters, found {places}"
        )
    rates = [keep] * len(places) if isinstance(keep, int | float) else list(keep)
    if len(rates) != len(places):
        raise ConfigError(
            f"{key}.keep: expected one share, or {len(places)}, one for each of the blocks "
            f"{places}, found {len(rates)}: {rates}"
        )
    if not all(0 < rate <= 1 for rate in rates):
        raise ConfigError(f"{key}.keep: expected shares above 0, up to 1, found {rates}")
    for place, rate in zip(places, rates, strict=True):
        attn, prefix = vit.blocks[place].attn, int(vit.num_prefix_tokens)
        own = TokenSparsifier(attn, prefix, rate, fuse, shrink_start, shrink_steps)
        vit.blocks[place] = SparseBlock(vit.blocks[place], own)
    return places


class TokenSparsifier(nn.Module):
    """Keep the patches that the class token attends to most, fuse the others. ``[B, N, D] ->
    [B, M, D]``, with M = prefix + K + 1, K = ceil(``keep`` P) (EViT, arXiv 2202.07800, as in
    ``models/vit_image.py`` of Sparse-Tuning).

    A score is the class token's attention to a patch in the block's own attention, mean over heads:
    that one row is computed from queries and keys, which fused attention does not give away.
    Kept patches are in the order of their scores. The fused token, last, is the sum of the others
    times their scores, which are not normalised. It is a patch like others from then on.
    """

    step: Tensor
    """The optimizer step whose share is kept, -1 before training: then it is ``keep``. An integer,
    so that no change of precision rounds it. In checkpoints of models whose share shrinks."""

    def __init__(
        self,
        attn: Any,
        prefix: int,
        keep: float,
        fuse: bool = True,
        shrink_start: int = 0,
        shrink_steps: int = 0,
    ) -> None:
        super().__init__()
        self.prefix, self.keep, self.fuse = prefix, keep, fuse
        self.shrink_start, self.shrink_steps = shrink_start, shrink_steps
        self.scale = float(attn.scale)
        self._rate = keep  # of the buffer, which may be on a GPU
        if shrink_steps:
            self.register_buffer("step", torch.tensor(-1))
        # NOTE: q_norm and k_norm are called in every build of attention, as identities too. Bound
        # methods, so that a copy of the block feeds the copy of this.
        self._seen: dict[str, Tensor] = {}
        attn.q_norm.register_forward_hook(self._see_queries)
        attn.k_norm.register_forward_hook(self._see_keys)

    def _see_queries(self, module: nn.Module, inputs: Any, q_BHNd: Tensor) -> None:
        self._seen["q"] = q_BHNd[:, :, :1]

    def _see_keys(self, module: nn.Module, inputs: Any, k_BHNd: Tensor) -> None:
        self._seen["k"] = k_BHNd

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": {}}

    def go_to(self, step: int) -> None:
        """Set the share of an optimizer step, in training alone: 1 before ``shrink_start``, then
        down to ``keep`` along half a cosine of ``shrink_steps`` (EViT, ``helpers.py``)."""
        if self.shrink_steps:
            self.step.fill_(step)
            self._set_rate(step)

    def _set_rate(self, step: int) -> None:
        done = min(1.0, max(0.0, (step - self.shrink_start) / self.shrink_steps))
        rest = 0.0 if step < 0 else (math.cos(done * math.pi) + 1) / 2
        self._rate = min(1.0, self.keep + (1 - self.keep) * rest)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.shrink_steps and not self.step.is_meta:
            self._set_rate(int(self.step))

    def kept(self, patches: int) -> int:
        """Return K."""
        return math.ceil(self._rate * patches)

    def forward(self, x_BND: Tensor) -> Tensor:
        query_BH1d, key_BHNd = self._seen.pop("q"), self._seen.pop("k")
        patches = x_BND.shape[1] - self.prefix
        kept = self.kept(patches)
        if kept == patches:
            return x_BND
        # Shapes without data (``metrics.efficiency``) have no autocast.
        device = x_BND.device.type
        exact = nullcontext() if x_BND.is_meta else torch.autocast(device, enabled=False)
        with exact:
            row_BN = class_attention(query_BH1d, key_BHNd, self.scale)
            return self._reduced(x_BND, row_BN[:, self.prefix :], kept)

    def _reduced(self, x_BND: Tensor, score_BP: Tensor, kept: int) -> Tensor:
        patch_BPD = x_BND[:, self.prefix :]
        index_BK = score_BP.topk(kept, dim=1).indices
        index_BKD = index_BK[:, :, None].expand(-1, -1, x_BND.shape[2])
        parts = [x_BND[:, : self.prefix], patch_BPD.gather(1, index_BKD)]
        if self.fuse:
            # One product with zeros in the places of those that are kept: no second gather.
            weight_BP = score_BP.scatter(1, index_BK, 0.0).to(x_BND.dtype)
            parts.append(weight_BP[:, None] @ patch_BPD)
        return torch.cat(parts, dim=1)

    def extra_repr(self) -> str:
        return f"keep={self.keep:g}, fuse={self.fuse}"


def class_attention(query_BH1d: Tensor, key_BHNd: Tensor, scale: float) -> Tensor:
    """Return the attention of the class token to all tokens, mean over heads, [B, N], in fp32: in
    bf16 many patches would have equal scores."""
    dtype = torch.promote_types(key_BHNd.dtype, torch.float32)
    logits_BH1N = (query_BH1d.to(dtype) * scale) @ key_BHNd.to(dtype).transpose(-2, -1)
    return logits_BH1N.softmax(dim=-1).squeeze(2).mean(dim=1)


class DenseAdapter(nn.Module):
    """Two bottlenecks, the outer of width ``dim`` with the inner's input and output joined.
    ``[..., D] -> [..., D]``, 0 at the start (``models/adapter.py`` of Sparse-Tuning, whose names of
    parameters these are).

    h = relu(down1 x); u = down2 h; v = up1 u; y = up2(down3 [u; v] + h).
    """

    def __init__(self, width: int, dim: int = 64, inner: int = 32) -> None:
        super().__init__()
        self.down1 = nn.Linear(width, dim)
        self.down2 = nn.Linear(dim, inner)
        self.up1 = nn.Linear(inner, dim)
        self.down3 = nn.Linear(inner + dim, dim)
        self.up2 = nn.Linear(dim, width)
        for layer in (self.down1, self.down2, self.down3):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            nn.init.zeros_(layer.bias)
        for layer in (self.up1, self.up2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.down1(x))
        u = self.down2(h)
        joined = self.down3(torch.cat([u, self.up1(u)], dim=-1))
        y: Tensor = self.up2(joined + h)
        return y


class Link(NamedTuple):
    """The place of a block in a dense link: a stage's adapters add their outputs to its end once
    more."""

    embeds: bool
    """The first block, whose input is among them."""
    joins: bool
    """This block's adapter is among them."""
    closes: bool
    """The last block of a stage."""


Stream = Tensor | tuple[Tensor, Tensor]
"""Tokens, or within a linked stage tokens and the sum that its end will add: blocks keep nothing
between their calls, so that each can be computed again for its gradient."""


class SparseBlock(nn.Module):
    """The parts of a timm block, with a sparsifier between attention and FFN and an adapter beside
    the FFN."""

    adapter: DenseAdapter | None
    sparsifier: TokenSparsifier | None

    def __init__(self, block: nn.Module, sparsifier: TokenSparsifier | None = None) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.norms_last = isinstance(block, ResPostBlock)
        self.sparsifier, self.adapter = sparsifier, None
        self.link: Link | None = None
        self.train(block.training)

    def forward(self, stream: Stream) -> Stream:
        x_BND, sum_BND = stream if isinstance(stream, tuple) else (stream, None)
        if self.link is not None and self.link.embeds:
            sum_BND = x_BND
        x_BND = x_BND + self._attention(x_BND)
        if self.sparsifier is not None:
            x_BND = self.sparsifier(x_BND)
        y_BND = x_BND + self._ffn(x_BND)
        if self.adapter is not None:
            adapted_BND = self.adapter(x_BND)
            y_BND = y_BND + adapted_BND
            if self.link is not None and self.link.joins:
                sum_BND = adapted_BND if sum_BND is None else sum_BND + adapted_BND
        if self.link is None or sum_BND is None:
            return y_BND
        return y_BND + sum_BND if self.link.closes else (y_BND, sum_BND)

    def _attention(self, x_BND: Tensor) -> Tensor:
        part: Any = self
        if self.norms_last:
            y_BND: Tensor = part.drop_path1(part.norm1(part.attn(x_BND)))
        else:
            y_BND = part.drop_path1(part.ls1(part.attn(part.norm1(x_BND))))
        return y_BND

    def _ffn(self, x_BND: Tensor) -> Tensor:
        part: Any = self
        if self.norms_last:
            y_BND: Tensor = part.drop_path2(part.norm2(part.mlp(x_BND)))
        else:
            y_BND = part.drop_path2(part.ls2(part.mlp(part.norm2(x_BND))))
        return y_BND


def add_adapters(
    vit: Any,
    starts: Sequence[int],
    pretrained: bool,
    dim: int = 64,
    inner: int = 32,
    links: bool = True,
    link_embeddings: bool = False,
    link_last: bool = True,
    freeze: bool | None = None,
) -> None:
    """Add a ``DenseAdapter`` to every block, in place.

    ``links``: after the last block of each stage the outputs of its adapters are added once more;
    stages begin at block 0 and at ``starts``. ``link_embeddings``: the first stage adds its input
    too, which changes a pretrained model before any training; ``link_last=False``: the last block's
    adapter is not among the last stage's. Both are what the official code does.
    ``freeze``: only adapters and head are trained; None: where the weights are ``pretrained``.

    Raises:
        ConfigError: embeddings that are linked to a stage with fewer tokens, or without links.
    """
    for index, block in enumerate(vit.blocks):
        if not isinstance(block, SparseBlock):
            vit.blocks[index] = SparseBlock(block)
    blocks = list(vit.blocks)
    if link_embeddings and (not links or 0 in starts):
        reason = "links is false" if not links else "block 0 has fewer tokens than them already"
        raise ConfigError(
            f"backbone.adapter.link_embeddings: they are added at the end of the first stage, but "
            f"{reason}. Set it to false"
        )
    edges = sorted({0, *starts, len(blocks)})
    for index, block in enumerate(blocks):
        block.adapter = DenseAdapter(vit.embed_dim, dim, inner)
        last = index + 1 == len(blocks)
        if links:
            block.link = Link(
                embeds=link_embeddings and index == 0,
                joins=link_last or not last,
                closes=index + 1 in edges,
            )
    if pretrained if freeze is None else freeze:
        vit.requires_grad_(False)
        for part in (*_heads(vit), *(block.adapter for block in blocks)):
            part.requires_grad_(True)


def _heads(vit: Any) -> Iterator[nn.Module]:
    names = vit.pretrained_cfg["classifier"]
    for name in (names,) if isinstance(names, str) else names or ():
        yield vit.get_submodule(name)


def token_counts(vit: Any) -> list[int]:
    """Return the tokens after each block of an image of the model's size."""
    patches, prefix = int(vit.patch_embed.num_patches), int(vit.num_prefix_tokens)
    found = []
    for block in vit.blocks:
        sparsifier = getattr(block, "sparsifier", None)
        if sparsifier is not None:
            kept = sparsifier.kept(patches)
            patches = kept if kept == patches else kept + sparsifier.fuse
        found.append(prefix + patches)
    return found
