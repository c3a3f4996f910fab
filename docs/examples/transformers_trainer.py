"""DynMoE under transformers' Trainer: a small language model whose experts come and go.

python docs/examples/transformers_trainer.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from dynmoe.adaptation import DynMoETrainerCallback
from dynmoe.layers import MoELayer, TopAnyRouter, record_routing

set_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
)
model = LlamaForCausalLM(config)
for layer in model.model.layers:
    # The FFN becomes a pool of 4 experts, copies of it, that may grow to 8.
    layer.mlp = MoELayer(layer.mlp, config.hidden_size, TopAnyRouter, num_experts=4, max_experts=8)

starts = torch.randint(64, (512, 1))
texts = (starts + torch.arange(16) * torch.randint(1, 4, (512, 1))) % 64  # arithmetic sequences
data = [{"input_ids": text, "labels": text} for text in texts]


def show(event):
    print(
        f"step {event['step']}, {event['layer']}: {event['before']} -> {event['after']} experts "
        f"(removed {event['removed']}, added {event['added']}), unserved {event['unrouted']:.1%}"
    )


def show_k(when):
    with record_routing(model) as tape, torch.no_grad():
        model.eval()(input_ids=texts[:64].to(model.device))
    print(
        when,
        {name: f"k {calls[0].mask.sum(-1).float().mean():.2f}" for name, calls in tape.items()},
    )


show_k("before")
with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        max_steps=60,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=20,
    )
    callback = DynMoETrainerCallback(start=0, length=20, period=20, on_event=show)
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
show_k("after")
