"""DynMoE in a LightningModule of your own: a timm ViT whose experts come and go.

python docs/examples/lightning_module.py
"""

import lightning as L
import timm
import torch
from torch.nn import functional as F

from dynmoe.adaptation import DynMoECallback
from dynmoe.layers import MoELayer, TopAnyRouter, aux_loss, record_routing


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4, num_classes=10
        )
        for block in self.net.blocks[1::2]:
            # The FFN becomes a pool of 4 experts, copies of it, that may grow to 8.
            block.mlp = MoELayer(block.mlp, 48, TopAnyRouter, num_experts=4, max_experts=8)

    def training_step(self, batch, _):
        images, labels = batch
        with record_routing(self.net) as tape:
            loss = F.cross_entropy(self.net(images), labels)
        self.k = {name: calls[0].mask.sum(-1).float().mean() for name, calls in tape.items()}
        return loss + 0.01 * aux_loss(tape)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


L.seed_everything(0, verbose=False)
model = Classifier()


def show(event):
    print(
        f"step {event['step']}, {event['layer']}: k {model.k[event['layer']]:.2f}, "
        f"{event['before']} -> {event['after']} experts "
        f"(removed {event['removed']}, added {event['added']})"
    )


data = torch.utils.data.TensorDataset(torch.randn(160, 3, 32, 32), torch.randint(10, (160,)))
trainer = L.Trainer(
    max_epochs=2,
    callbacks=[DynMoECallback(start=0, length=5, period=5, on_event=show)],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=16))
