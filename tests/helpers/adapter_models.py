"""Small models to put adapters on, of an RWKV-6's shape and of another."""

import torch
from torch import nn


class Mixer(nn.Module):
    """A block with RWKV-6's names: its 8 linears, and others that no method adapts by default."""

    def __init__(self, C: int, F: int) -> None:
        super().__init__()
        self.att = nn.Module()
        for name in ("receptance", "key", "value", "gate", "output"):
            setattr(self.att, name, nn.Linear(C, C, bias=False))
        self.att.extra = nn.Linear(C, C)
        self.ffn = nn.Module()
        self.ffn.key = nn.Linear(C, F, bias=False)
        self.ffn.receptance = nn.Linear(C, C, bias=False)
        self.ffn.value = nn.Linear(F, C, bias=False)

    def forward(self, x):
        for name in ("receptance", "key", "value", "gate", "output"):
            x = x + getattr(self.att, name)(x).tanh()
        return x + self.ffn.value(self.ffn.key(x).relu()) * self.ffn.receptance(x).sigmoid()


class Finchlike(nn.Module):
    def __init__(self, L: int, C: int, F: int, V: int = 16) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(Mixer(C, F) for _ in range(L))
        self.head = nn.Linear(C, V, bias=False)

    def forward(self, tokens):
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Classifier(nn.Module):
    """A model that is not an RWKV: biases, a shared layer, an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.again = self.down
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        x = self.down(self.up(x).relu())
        return self.classifier(self.again(self.up(x).relu()))


def finchlike() -> Finchlike:
    return Finchlike(2, 8, 12)


TOKENS = torch.arange(10).view(2, 5)


def move(model: nn.Module) -> None:
    """Train, in effect: change every trainable parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
