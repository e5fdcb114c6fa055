"""How every tensor of a new RWKV-6 starts. One table, in the order of the weight file."""

import torch
from torch import nn

from finchtune.models.init import init_all, row
from finchtune.models.rwkv6.model import RWKV6, ChannelMix, TimeMix


def init_weights(model: RWKV6, seed: int | None = None) -> RWKV6:
    """Initialise all tensors for training from scratch, reproducibly when `seed` is given."""
    init_all(model, {TimeMix: _init_time_mix, ChannelMix: _init_channel_mix}, seed)
    return model


def _init_time_mix(att: TimeMix) -> None:
    C, L, layer = att.config.n_embd, att.config.n_layer, att.layer
    rho = layer / (L - 1) if L > 1 else 0.0  # 0 at the first layer, 1 at the last
    q = 1 - layer / L  # 1 at the first layer, towards 0 at the last
    delta = torch.arange(C) / C
    n = torch.arange(C) / max(1, C - 1)

    att.time_maa_x.copy_(row(1 - delta**q))
    att.time_maa_w.copy_(row(1 - delta**q))
    att.time_maa_k.copy_(row(1 - delta**q))
    att.time_maa_v.copy_(row(1 - (delta**q + 0.3 * rho)))
    att.time_maa_r.copy_(row(1 - delta ** (q / 2)))
    att.time_maa_g.copy_(row(1 - delta ** (q / 2)))
    nn.init.zeros_(att.time_maa_w1)
    nn.init.uniform_(att.time_maa_w2, -0.01, 0.01)

    att.time_decay.copy_(row(-6 + 5 * n ** (0.7 + 1.3 * rho)))
    nn.init.zeros_(att.time_decay_w1)
    nn.init.uniform_(att.time_decay_w2, -0.01, 0.01)
    zigzag = ((torch.arange(C) + 1) % 3 - 1) * 0.1
    att.time_faaaa.copy_((rho * (1 - n) + zigzag).view_as(att.time_faaaa))

    nn.init.orthogonal_(att.receptance.weight, gain=1.0)
    nn.init.orthogonal_(att.key.weight, gain=0.1)
    nn.init.orthogonal_(att.value.weight, gain=1.0)
    nn.init.zeros_(att.output.weight)
    nn.init.orthogonal_(att.gate.weight, gain=0.1)
    nn.init.constant_(att.ln_x.weight, ((1 + layer) / L) ** 0.7)
    nn.init.zeros_(att.ln_x.bias)


def _init_channel_mix(ffn: ChannelMix) -> None:
    C, L, layer = ffn.config.n_embd, ffn.config.n_layer, ffn.layer
    blend = 1 - (torch.arange(C) / C) ** (1 - layer / L)
    ffn.time_maa_k.copy_(row(blend))
    ffn.time_maa_r.copy_(row(blend))
    nn.init.orthogonal_(ffn.key.weight, gain=1.0)
    nn.init.zeros_(ffn.receptance.weight)
    nn.init.zeros_(ffn.value.weight)
