"""A model of transformers with mixtures of experts in the place of some of its FFNs.

Written by dynmoe-convert. It needs torch and transformers alone:
`from_pretrained(FOLDER, trust_remote_code=True)`. `experts_implementation=` is "grouped_mm", which
is the default, "batched_mm" or "eager". It is for inference: the router gets no auxiliary loss.

Shape suffixes: T tokens, E experts, K choices of a token, D model width, H hidden neurons.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers import BertConfig as BaseConfig
from transformers import BertForSequenceClassification as BaseModel
from transformers import BertModel as BaseBody
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

HAS_GATE, HAS_BIAS = False, True


class TopAny(nn.Module):
    """Every expert whose score is above its own threshold, or else the best one (DynMoE, arXiv
    2405.14297): as many as the token needs, equally weighted.

    The number of experts stands for "no further expert".
    """

    def __init__(self, mixture: dict[str, Any], num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, mixture["width"]))
        self.thresholds = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        num_experts = len(self.weight)
        scores_TE = cosine(x_TD, self.weight.float())
        mask_TE = scores_TE.sigmoid() > self.thresholds.float().sigmoid()
        best_TE = F.one_hot(scores_TE.argmax(1), num_experts).bool()
        mask_TE = mask_TE | (best_TE & ~mask_TE.any(1, keepdim=True))
        experts_E = torch.arange(num_experts, device=x_TD.device)
        index_TE = torch.where(mask_TE, experts_E, num_experts).sort(1).values
        k_T1 = mask_TE.sum(1, keepdim=True)
        # Compiled code must not depend on data: it keeps as many choices as there are experts.
        if not torch.compiler.is_compiling() and len(x_TD):
            index_TE = index_TE[:, : int(k_T1.max())]
        return index_TE, (index_TE < num_experts).float() / k_T1


class TopK(nn.Module):
    """The `top_k` most probable experts. Their probabilities are made to sum to 1 where they are
    `normalised`; `scale` multiplies them."""

    def __init__(self, mixture: dict[str, Any], num_experts: int) -> None:
        super().__init__()
        self.top_k, self.scale = mixture["top_k"], mixture["scale"]
        self.normalised = mixture["normalised"]
        self.weight = nn.Parameter(torch.zeros(num_experts, mixture["width"]))

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight.float())

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        weights_TK, index_TK = self.logits(x_TD).softmax(1).topk(self.top_k, dim=1)
        if self.normalised:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=1e-9)
        return index_TK, weights_TK * self.scale


class CosineTopK(TopK):
    """The same by cosines between a projected token and the experts' embeddings (GMoE, arXiv
    2206.04046)."""

    def __init__(self, mixture: dict[str, Any], num_experts: int) -> None:
        super().__init__({**mixture, "width": mixture["projection"]}, num_experts)
        self.project = nn.Linear(mixture["width"], mixture["projection"])
        self.log_scale = nn.Parameter(torch.zeros(()))

    def logits(self, x_TD: Tensor) -> Tensor:
        projected = F.linear(x_TD, self.project.weight.float(), self.project.bias.float())
        scale = self.log_scale.float().clamp(max=math.log(100)).exp()
        return cosine(projected, self.weight.float()) * scale


class TopKeys(nn.Module):
    """The `top_k` experts whose mean keys have the largest product with the token, weighted by
    `scale` / `top_k` each (EMoE, arXiv 2310.10908)."""

    def __init__(self, mixture: dict[str, Any], num_experts: int) -> None:
        super().__init__()
        self.top_k, self.scale = mixture["top_k"], mixture["scale"]
        self.weight = nn.Parameter(torch.zeros(num_experts, mixture["width"]))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        index_TK = F.linear(x_TD, self.weight.float()).topk(self.top_k, dim=1).indices
        return index_TK, torch.full_like(index_TK, self.scale / self.top_k, dtype=torch.float32)


def cosine(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """Cosine similarity of all rows, [T, E]; 0 for a row of zeros."""
    norm_T1 = torch.linalg.vector_norm(x_TD, dim=1, keepdim=True)
    inverse_T1 = torch.where(norm_T1 > 1e-12, 1 / norm_T1, 0)
    return F.linear(x_TD, F.normalize(w_ED, dim=1)) * inverse_T1


@use_experts_implementation(has_gate=HAS_GATE, has_bias=HAS_BIAS)
class StackedExperts(nn.Module):
    """FFNs of equal shape as stacked tensors. `forward` is `experts_implementation="eager"`."""

    gate_up_proj: Tensor
    gate_up_proj_bias: Tensor
    up_proj: Tensor
    up_proj_bias: Tensor
    _apply_gate: Any  # of transformers: act_fn(gate) * up
    _is_expert_parallel: bool  # of transformers

    def __init__(self, config: MixtureConfig, num_experts: int) -> None:
        super().__init__()
        mixture = config.mixture
        width, hidden = mixture["width"], mixture["hidden"]
        self.num_experts = num_experts
        self.act_fn = ACT2FN[mixture["activation"]]
        first = "gate_up_proj" if HAS_GATE else "up_proj"
        rows = 2 * hidden if HAS_GATE else hidden  # of the gate, then of the other matrix
        self.register_parameter(first, nn.Parameter(torch.zeros(num_experts, rows, width)))
        self.down_proj = nn.Parameter(torch.zeros(num_experts, width, hidden))
        if HAS_BIAS:
            self.register_parameter(f"{first}_bias", nn.Parameter(torch.zeros(num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        first = self.gate_up_proj if HAS_GATE else self.up_proj
        if HAS_BIAS:
            first_bias = self.gate_up_proj_bias if HAS_GATE else self.up_proj_bias
        for e in range(self.num_experts):
            token, choice = torch.where(index_TK == e)
            hidden = F.linear(x_TD[token], first[e], first_bias[e] if HAS_BIAS else None)
            hidden = self._apply_gate(hidden) if HAS_GATE else self.act_fn(hidden)
            out = F.linear(hidden, self.down_proj[e], self.down_proj_bias[e] if HAS_BIAS else None)
            out = out * weights_TK[token, choice, None]
            y_TD.index_add_(0, token, out.to(y_TD.dtype))
        return y_TD


class MixtureOfExperts(nn.Module):
    """Router and experts in the place of an FFN."""

    def __init__(self, config: MixtureConfig, num_experts: int, output_bias: bool) -> None:
        super().__init__()
        width = config.mixture["width"]
        self.router = TopAny(config.mixture, num_experts)
        self.experts = StackedExperts(config, num_experts)
        # transformers skips choices that stand for "no further expert" only where this is set.
        self.experts._is_expert_parallel = True
        self.output_bias = nn.Parameter(torch.zeros(width)) if output_bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        with torch.autocast(x_TD.device.type, enabled=False):  # thresholds need fp32
            index_TK, weights_TK = self.router(x_TD.float())
        y = self.experts(x_TD, index_TK, weights_TK.to(x_TD.dtype)).view_as(hidden_states)
        return y if self.output_bias is None else y + self.output_bias


class MixtureConfig(BaseConfig):
    """The configuration of the model without experts, and `mixture`: router, sizes of the experts
    and, by its place in the body, the number of experts of each mixture."""

    model_type = f"dynmoe_{BaseConfig.model_type}"


class WithMixtures:
    """Mixtures in the place of FFNs, for a body and for a body under a head."""

    config_class: Any = MixtureConfig
    _keep_in_fp32_modules_strict: Any = frozenset({"router"})

    def __init__(self: Any, config: MixtureConfig, **options: Any) -> None:
        implementation = config._experts_implementation
        config._experts_implementation = "eager"  # parts of the dense model refuse any other
        super().__init__(config, **options)  # type: ignore[call-arg]
        config._experts_implementation = self.get_correct_experts_implementation(implementation)
        body = getattr(self, self.base_model_prefix, self)
        for place, layer in config.mixture["layers"].items():
            if isinstance(body.get_submodule(place), MixtureOfExperts):
                continue  # transformers made the body by `AutoModel`
            for path in layer["left_out"]:  # parts of the FFN that the experts have taken over
                body.set_submodule(path, nn.Identity())
            mixture = MixtureOfExperts(config, layer["num_experts"], layer["output_bias"])
            body.set_submodule(place, mixture)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would take the answer of the dense model that it derives from


class MixtureBody(WithMixtures, BaseBody):
    """The body of the model, with mixtures."""


class MixtureModel(WithMixtures, BaseModel):
    """The model with its head. Some heads make their body by `AutoModel`."""


AutoModel.register(MixtureConfig, MixtureBody, exist_ok=True)
