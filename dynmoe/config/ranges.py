"""Ranges of the numbers of a configuration: both ends of each, in one table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fnmatch import translate
from functools import lru_cache
from typing import NamedTuple


class Range(NamedTuple):
    words: str
    holds: Callable[[float], bool]


COUNT = Range("1 or more", lambda n: n >= 1)
ENDLESS = Range("1 or more, or -1 for no end", lambda n: n >= 1 or n == -1)
NOT_NEGATIVE = Range("0 or more", lambda n: n >= 0)
POSITIVE = Range("more than 0", lambda n: n > 0)
ABOVE_ONE = Range("more than 1", lambda n: n > 1)
SHARE = Range("a share from 0 to 1", lambda n: 0 <= n <= 1)
SOME = Range("a share above 0, up to 1", lambda n: 0 < n <= 1)
COSINE = Range("a cosine from -1 to 1", lambda n: -1 <= n <= 1)
BYTES = Range("257 or more, the bytes and an end token", lambda n: n >= 257)
BELOW_ONE = Range("0 or more, below 1", lambda n: 0 <= n < 1)
FROM_THE_END = Range("-1 or less, counted from the end", lambda n: n <= -1)
# numpy and Lightning take seeds of 32 bits.
SEED = Range("from 0 to 4294967295", lambda n: 0 <= n < 2**32)

LARGEST = 2**63 - 1  # of an integer in a tensor

# The first pattern that fits a key counts; `*` stands for any characters, `.0` is an element.
RANGES: dict[Range, str] = {
    SEED: "seed trial_seed hparams_seed data.trial_seed data.environments.seed",
    COUNT: (
        "moe.num_experts moe.max_experts moe.top_k moe.router.top_k moe.router.projection "
        "moe.conflict.every moe.router.chunk_length moe.router.max_k moe.router.num_blocks "
        " moe.router.num_groups moe.router.limited_groups "
        "moe.adaptation.min_experts "
        "task.epochs task.eval_every task.save_every task.routing_every task.patience "
        "protocol.patience "
        "protocol.*.epochs protocol.*.eval_every protocol.*.batch_size protocol.*.steps "
        "data.batch_size data.eval_batch_size data.eval_images data.max_length data.max_new_tokens "
        "data.length data.image_size data.patch_size data.content.px data.content.*_scenes "
        "data.content.test_questions data.content.max_turns "
        "backbone.image_size backbone.vision.image_size backbone.vision.patch_size "
        "backbone.lora.r backbone.lora.alpha backbone.adapter.dim backbone.adapter.inner "
        "trainer.accumulate_grad_batches trainer.num_nodes trainer.log_every_n_steps "
        "plan.conversations mixing.every mixing.probe_tokens"
    ),
    BYTES: "data.vocabulary",
    ENDLESS: "task.steps trainer.max_steps",
    NOT_NEGATIVE: (
        "task.optimizer.lr task.optimizer.weight_decay task.optimizer.eps "
        "protocol.*.lr protocol.*.weight_decay task.scheduler.num_warmup_steps "
        "moe.aux_weight task.module.aux_weight moe.router.*_weight moe.router.noise "
        "moe.router.smoothing moe.router.min_capacity moe.adaptation.start "
        "moe.adaptation.patience moe.adaptation.redundancy_weight "
        "moe.shared_experts moe.conflict.weight moe.conflict.start "
        "backbone.token_sparsify.blocks.* backbone.token_sparsify.shrink_* "
        "moe.router.schedule_every moe.router.schedule_start "
        "moe.router.num_null moe.router.num_constant moe.router.num_copy "
        "moe.router.num_zero moe.router.aux_end moe.router.bias_rate moe.router.free_balance "
        "moe.router.kp moe.router.ki moe.router.warm_up moe.router.slack "
        "runtime.progress_every data.cache_gb data.examples data.workers trainer.gradient_clip_val "
        "*.options.type_vocab_size mixing.eta mixing.weights.*"
    ),
    POSITIVE: (
        "moe.adaptation.length moe.adaptation.period moe.router.init_temperature "
        "moe.adaptation.until moe.adaptation.warmup moe.adaptation.window "
        "moe.router.capacity_factor moe.router.target_k* moe.router.temperature "
        "moe.router.route_scale moe.router.steepness moe.router.eps moe.router.lambda_init "
        "moe.router.slope moe.router.input_scale plan.tflops plan.mean_k plan.mean_tokens "
        "data.std.* backbone.vision.std.* *.options.mlp_ratio"
    ),
    ABOVE_ONE: "moe.router.lambda_rate moe.adaptation.check_from",
    SHARE: (
        "moe.router.top_p task.scheduler.warmup protocol.*.warmup data.holdout_fraction mixing.c"
    ),
    COSINE: "moe.conflict.threshold",
    SOME: (
        "plan.utilisation moe.router.budget_rate moe.adaptation.p_value moe.adaptation.cosine "
        "backbone.token_sparsify.keep*"
    ),
    BELOW_ONE: (
        "moe.expert_dropout backbone.drop_path backbone.lora.dropout task.optimizer.betas.* "
        "moe.router.ema moe.adaptation.remove_below data.validation data.test "
        "task.optimizer.momentum *.options.*drop*_rate *.options.*drop* *.options.*pdrop"
    ),
    FROM_THE_END: "backbone.vision.layer",
}
# Numbers below `options`, which builders of other libraries take as they are.
SIZES = (
    r".*\.options\.(depth|embed_dim|patch_size|vocab_size|max_position_embeddings|n_\w+|num_heads"
    r"|num_hidden_layers|num_attention_heads|num_key_value_heads|head_dim|hidden_size"
    r"|intermediate_size|embedding_size|image_size)"
)


@lru_cache
def _patterns() -> list[tuple[re.Pattern[str], Range]]:
    found = [
        (re.compile(translate(pattern)), each)
        for each, patterns in RANGES.items()
        for pattern in patterns.split()
    ]
    return [*found, (re.compile(SIZES), COUNT)]


@lru_cache
def range_of(key: str) -> Range | None:
    return next((each for pattern, each in _patterns() if pattern.fullmatch(key)), None)


def outside(key: str, value: object) -> str | None:
    """`"expected 1 or more, found 0"`; None for a value inside of its range, or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, found {value}"
    allowed = range_of(key)
    if allowed is not None and not allowed.holds(value):
        return f"expected {allowed.words}, found {value}"
    return f"expected at most {LARGEST}, found {value}" if abs(value) > LARGEST else None
