"""How every tensor of a new RWKV-7 starts. One table, in the order of the weight file.

Source: RWKV-LM, RWKV-v7/train_temp/src/model.py.
"""

import math

import torch
from torch import Tensor, nn

from finchtune.models.init import init_all, row
from finchtune.models.rwkv7.model import RWKV7, ChannelMix, TimeMix


def init_weights(model: RWKV7, seed: int | None = None) -> RWKV7:
    """Initialise all tensors for training from scratch, reproducibly when `seed` is given."""
    init_all(model, {TimeMix: _init_time_mix, ChannelMix: _init_channel_mix}, seed)
    return model


def _init_time_mix(att: TimeMix) -> None:
    C, N, L, layer = att.config.n_embd, att.config.head_size, att.config.n_layer, att.layer
    rho = layer / (L - 1) if L > 1 else 0.0  # 0 at the first layer, 1 at the last
    q = 1 - layer / L  # 1 at the first layer, towards 0 at the last
    delta = torch.arange(C) / C
    n = torch.arange(C) / max(1, C - 1)
    lin = n - 0.5
    centre = max(0.5, (N - 1) / 2)
    z = ((torch.arange(C) % N) - (N - 1) / 2) / centre
    zig = z * z.abs()

    for powers, names in ((0.2, "rg"), (0.9, "wa"), (0.7, "kv")):
        for name in names:
            getattr(att, f"x_{name}").copy_(row(1 - delta ** (powers * q)))
    att.w0.copy_(row(-6 + 6 * n ** (1 + rho**0.3) + 0.5 + 2.5 * zig))
    att.a0.copy_(row(-0.19 + 0.3 * zig + 0.4 * lin))
    if hasattr(att, "v0"):
        att.v0.copy_(row(0.73 - 0.4 * lin))
    for name in "wavg":
        if hasattr(att, f"{name}1"):
            nn.init.zeros_(getattr(att, f"{name}1"))
            _init_orthogonal(getattr(att, f"{name}2"), 0.1)
    att.k_k.copy_(row(0.71 - 0.1 * lin))
    nn.init.constant_(att.k_a, 1.02)
    nn.init.constant_(att.r_k, -0.04)

    bound = 0.5 / math.sqrt(C)
    nn.init.uniform_(att.receptance.weight, -bound, bound)
    nn.init.uniform_(att.key.weight, -0.1 * bound, 0.1 * bound)
    nn.init.uniform_(att.value.weight, -bound, bound)
    nn.init.zeros_(att.output.weight)
    nn.init.constant_(att.ln_x.weight, ((1 + layer) / L) ** 0.7)
    nn.init.zeros_(att.ln_x.bias)


def _init_channel_mix(ffn: ChannelMix) -> None:
    C, L, layer = ffn.config.n_embd, ffn.config.n_layer, ffn.layer
    bound = 0.5 / math.sqrt(C)
    ffn.x_k.copy_(row(1 - (torch.arange(C) / C) ** ((1 - layer / L) ** 4)))
    nn.init.uniform_(ffn.key.weight, -bound, bound)
    nn.init.zeros_(ffn.value.weight)


def _init_orthogonal(matrix: Tensor, gain: float) -> None:
    """Orthogonal; a matrix of more rows than columns is larger by the root of their ratio."""
    rows, columns = matrix.shape
    nn.init.orthogonal_(matrix, gain=gain * math.sqrt(max(1.0, rows / columns)))
