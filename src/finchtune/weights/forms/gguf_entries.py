"""The tensors of a GGUF of architecture rwkv6, and how ours become theirs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from finchtune.weights.forms.base import Entry, reshaped

RESCALE = 6
"""Every so many layers the runtime halves the hidden states, so that fp16 does not overflow."""


def entries(n_layer: int, rescale: int = RESCALE) -> list[Entry]:
    """Every tensor of this form."""
    found = [Entry("token_embd.weight", ("emb.weight",))]
    for theirs, ours in (("token_embd_norm", "blocks.0.ln0"), ("output_norm", "ln_out")):
        found += [Entry(f"{theirs}.{p}", (f"{ours}.{p}",)) for p in ("weight", "bias")]
    found.append(Entry("output.weight", ("head.weight",)))
    for layer in range(n_layer):
        found += layer_entries(layer, 2.0 ** (layer // rescale) if rescale else 1.0)
    return found


def layer_entries(layer: int, divisor: float) -> list[Entry]:
    """The tensors of one layer; its outputs are stored divided by a power of two."""
    a, f, b = f"blocks.{layer}.att", f"blocks.{layer}.ffn", f"blk.{layer}"
    maa = tuple(f"{a}.time_maa_{part}" for part in "wkvrg")
    found = [
        reshaped(f"{b}.time_mix_w1.weight", f"{a}.time_maa_w1", torch.t, torch.t),
        reshaped(f"{b}.time_mix_w2.weight", f"{a}.time_maa_w2", swapped, swapped),
        reshaped(f"{b}.time_mix_lerp_x.weight", f"{a}.time_maa_x", torch.ravel, as_row),
        Entry(f"{b}.time_mix_lerp_fused.weight", maa, fused, apart),
        Entry(f"{b}.time_mix_first.weight", (f"{a}.time_faaaa",)),
        reshaped(f"{b}.time_mix_decay.weight", f"{a}.time_decay", torch.ravel, as_row),
        reshaped(f"{b}.time_mix_decay_w1.weight", f"{a}.time_decay_w1", torch.t, torch.t),
        reshaped(f"{b}.time_mix_decay_w2.weight", f"{a}.time_decay_w2", torch.t, torch.t),
    ]
    for theirs, ours in (("attn_norm", "ln1"), ("attn_norm_2", "ln2"), ("time_mix_ln", "att.ln_x")):
        found += [
            Entry(f"{b}.{theirs}.{p}", (f"blocks.{layer}.{ours}.{p}",)) for p in ("weight", "bias")
        ]
    found += [Entry(f"{b}.time_mix_{n}.weight", (f"{a}.{n}.weight",))
              for n in ("receptance", "key", "value", "gate")]  # fmt: skip
    found += [reshaped(f"{b}.channel_mix_lerp_{p}.weight", f"{f}.time_maa_{p}", torch.ravel, as_row)
              for p in "kr"]  # fmt: skip
    found += [Entry(f"{b}.channel_mix_{n}.weight", (f"{f}.{n}.weight",))
              for n in ("key", "receptance")]  # fmt: skip
    for theirs, ours in (("time_mix_output", f"{a}.output"), ("channel_mix_value", f"{f}.value")):
        found.append(
            reshaped(
                f"{b}.{theirs}.weight",
                f"{ours}.weight",
                lambda t: t / divisor if divisor != 1 else t,
                lambda t: t * divisor if divisor != 1 else t,
            )
        )
    return found


def fused(vectors: Sequence[Tensor]) -> Tensor:
    """Five vectors as one tensor (5, 1, 1, C)."""
    return torch.stack([vector.reshape(1, 1, -1) for vector in vectors])


def apart(theirs: Tensor) -> Sequence[Tensor]:
    """The inverse of `fused`."""
    return theirs.view(5, 1, 1, -1).unbind()


def swapped(tensor: Tensor) -> Tensor:
    """The last two dimensions exchanged."""
    return tensor.transpose(-1, -2)


def as_row(vector: Tensor) -> Tensor:
    """C -> 1, 1, C."""
    return vector.reshape(1, 1, -1)
