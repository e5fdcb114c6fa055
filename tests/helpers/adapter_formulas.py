"""Every adapter method's formula, written out in plain loops."""

import torch

from finchtune.adapters import METHODS
from finchtune.adapters.registry import hyperparameters_of

SMALL = {"r": 4, "r1": 3, "r2": 5, "alpha": 6}


def small(name: str) -> dict:
    return {key: SMALL[key] for key in hyperparameters_of(METHODS[name]) if key in SMALL}


CASES = [(name, small(name)) for name in METHODS] + [
    ("bone", {"r": 3}),
    ("bone", {"r": 8}),
    ("bat", {"r": 4, "mode": "col"}),
    ("bat", {"r": 1, "mode": "col"}),
    ("disha", {"r1": 4, "r2": 2}),
    ("disha", {"r1": 8, "r2": 8}),
    ("lora", {"r": 2, "alpha": 3, "rslora": True}),
    ("pissa", {"r": 4, "svd_niter": None}),
]


def make(name: str, settings: dict, out: int = 12, k: int = 8, dtype=torch.float64):
    """An adapter that has moved away from its start, and its W."""
    W = torch.randn(out, k, dtype=dtype)
    adapter = METHODS[name](k, out, **settings).to(dtype)
    start(adapter, W)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    return adapter, W


def start(adapter, W):
    if adapter.name == "lora_ga":
        adapter.init_from_gradient(W, torch.randn_like(W))
    else:
        adapter.init(W)


def product(B, A):
    """B A, entry by entry."""
    return torch.stack(
        [
            torch.stack(
                [sum(b * a for b, a in zip(row, A[:, i], strict=True)) for i in range(A.shape[1])]
            )
            for row in B
        ]
    )


def entries(W, change):
    """W plus change(o, i), entry by entry."""
    rows = [[W[o, i] + change(o, i) for i in range(W.shape[1])] for o in range(W.shape[0])]
    return torch.stack([torch.stack(row) for row in rows])


def bat_weight(adapter, W):
    """Equations 4 and 5, block by block."""
    r, D = adapter.r, adapter.bone
    rows = []
    for a in range(W.shape[0] // r):
        row = []
        for b in range(W.shape[1] // r):
            block = W[a * r : a * r + r, b * r : b * r + r]
            shard = D[b] if adapter.mode == "row" else D[a]
            row.append(block + product(block, shard) + shard)
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def low_rank_weight(adapter, W):
    return W + adapter.scale * product(adapter.lora_B, adapter.lora_A)


def residual_weight(adapter, W):
    start = product(adapter.init_lora_B, adapter.init_lora_A)
    return low_rank_weight(adapter, W) - adapter.scale * start


def weight_read_off(adapter, W):
    """W' of a linear method that has no formula here: what forward does with the unit vectors."""
    return adapter(torch.eye(W.shape[1], dtype=W.dtype), W).T


def formula(name: str):
    """The oracle of a method."""
    return FORMULAS.get(name, weight_read_off)


def dora_weight(adapter, W):
    """The norms are constants in backward."""
    rows = zip(adapter.magnitude, low_rank_weight(adapter, W), strict=True)
    return torch.stack([m * row / sum(v.detach() ** 2 for v in row).sqrt() for m, row in rows])


FORMULAS = {
    "bone": lambda a, W: entries(W, lambda o, i: a.bone[i % a.r, o]),
    "bat": bat_weight,
    "lora": low_rank_weight,
    "biglora": low_rank_weight,
    "pissa": residual_weight,
    "olora": residual_weight,
    "lora_ga": residual_weight,
    "dora": dora_weight,
    "disha": lambda a, W: entries(
        W, lambda o, i: a.shard[o % a.shard.shape[0], i % a.shard.shape[1]]
    ),
    "frozen_ft": lambda a, W: entries(W, lambda o, i: a.delta[o, i]),
}
"""W' of each method, written out; differentiable, so that its gradients are the oracle too."""
