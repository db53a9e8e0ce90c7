"""Small models and a training loop for the portable policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lightning_easyscale.kernels import common_paths, put_in_force


def convolutional() -> tuple[nn.Module, Tensor]:
    """A classifier of images with what the demo's workload uses, and a batch."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.25), nn.Linear(12 * 9, 10)),
    )
    return net, torch.randn(16, 1, 12, 12)


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def transformer() -> tuple[nn.Module, Tensor]:
    """A two-layer transformer with dropout, and a batch of tokens."""
    return _Transformer(), torch.randint(0, 50, (16, 9))


def losses_and_parameters(
    model: Callable[[], tuple[nn.Module, Tensor]],
    optimizer: str,
    *,
    device: str,
    steps: int,
    threads: int | None = None,
    stock: bool = False,
    mode: AbstractContextManager[object] | None = None,
) -> list[Tensor]:
    """Each step's loss, then all parameters and buffers, on the CPU; under the portable policy, `mode` or neither."""
    torch.manual_seed(11)
    net, batch = model()
    target = torch.randint(0, 10, (len(batch),)).to(device)
    net, batch = net.to(device), batch.to(device)
    if threads:
        torch.set_num_threads(threads)
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    }
    stepper = kinds[optimizer](net.parameters())
    losses = []

    def train() -> None:
        for _ in range(steps):
            stepper.zero_grad()
            loss = nn.functional.cross_entropy(net(batch), target)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            stepper.step()
            losses.append(loss.detach())

    if stock:
        train()
    else:
        with common_paths(), mode or put_in_force():
            train()
    return [x.float().cpu() for x in (*losses, *(p.detach() for p in net.parameters()), *net.buffers())]
