"""DynMoE in a plain PyTorch loop: a small classifier whose experts come and go.

python docs/examples/plain_loop.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from dynmoe.adaptation import Adaptation, Schedule
from dynmoe.layers import MoELayer, TopAnyRouter, aux_loss, record_routing

torch.manual_seed(0)
WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


model = nn.Sequential(nn.Linear(16, WIDTH), Block(), Block(), nn.Linear(WIDTH, 10))
for block in (model[1], model[2]):
    # The FFN becomes a pool of 4 experts, copies of it, that may grow to 8.
    block.mlp = MoELayer(block.mlp, WIDTH, TopAnyRouter, num_experts=4, max_experts=8)

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after the layers, of all parameters
adaptation = Adaptation(model, optimizer, Schedule(start=0, length=10, period=10))

centres = torch.randn(10, 16)
for step in range(60):
    y = torch.randint(10, (128,))
    x = centres[y] + torch.randn(128, 16)
    with record_routing(model) as tape:
        loss = F.cross_entropy(model(x), y)
    (loss + 0.01 * aux_loss(tape)).backward()
    optimizer.step()
    optimizer.zero_grad()
    for event in adaptation.step(loss):
        k = tape[event["layer"]][0].mask.sum(-1).float().mean()
        print(
            f"step {step}, layer {event['layer']}: loss {loss:.2f}, k {k:.2f}, "
            f"{event['before']} -> {event['after']} experts "
            f"(removed {event['removed']}, added {event['added']})"
        )

# To go on later: model.state_dict(), optimizer.state_dict() and adaptation.state_dict().
adaptation.close()
