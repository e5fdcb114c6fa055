"""RWKV-6 without autograd, by compiled CPU operators: what writing text calls.

The model's formulas are those of `model.py`. Every token is a row (C) here; the rows of all
sequences follow one another. With plain weights a sequence's result does not depend on the
others, to the last bit; layers with an adapter run as they are.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from finchtune.models.recurrent import BlockState, State, filled
from finchtune.models.rwkv6.model import RWKV6, Block, ChannelMix, TimeMix
from finchtune.ops.kernels import fits_cpu

NONE, TANH, SQUARED_RELU = range(3)  # activations of the operator `products`


def fits(model: RWKV6) -> bool:
    """Whether the compiled form takes a model: whole, on a CPU, all but adapters of one dtype."""
    own = [p for name, p in model.named_parameters() if ".adapter." not in name]
    whole = all(p.numel() for p in own)  # ZeRO-3 leaves shells
    return whole and fits_cpu(*own) and model.config.head_size in range(8, 129, 8)


class CompiledRWKV6:
    """The model as it is now: small matrices are copied, so build it anew when they change."""

    def __init__(self, model: RWKV6):
        self.model = model
        self.blocks = [CompiledBlock(cast(Block, block)) for block in model.blocks]

    def advance(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `RWKV6.advance`, which says what the arguments are.

        Where each sequence has one token, the given WKV state is written to.
        """
        B, T = tokens.shape
        if cu_seqlens is None and T > 1:
            cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32)
        rows = Rows(B, cu_seqlens)
        x = self.model.emb(tokens.flatten())
        new_state = []
        for layer, block in enumerate(self.blocks):
            x, block_state = block(x, rows, state[layer] if state else None)
            new_state.append(block_state)
        return self.model.ln_out(rows.last(x)), new_state

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, C) -> (rows, V)."""
        return products([hidden], [self.model.head], [NONE])[0]


class Rows:
    """Which rows of x (rows, C) are whose: one each of `count` sequences, or at boundaries."""

    def __init__(self, count: int, cu_seqlens: Tensor | None):
        self.cu_seqlens = cu_seqlens
        self.ends = None if cu_seqlens is None else cu_seqlens[1:].long() - 1
        self.count = count if cu_seqlens is None else len(cu_seqlens) - 1

    def last(self, x: Tensor) -> Tensor:
        """The last row of each sequence, (S, C): a copy, or all of x where each has one."""
        return x if self.ends is None else x.index_select(0, self.ends)

    def batch(self, x: Tensor) -> Tensor:
        """x as (B, T, ...), which operators for packed sequences take."""
        return x.unsqueeze(0 if self.cu_seqlens is not None else 1)


class CompiledBlock:
    """One block."""

    def __init__(self, block: Block):
        self.block = block
        self.time_mix, self.channel_mix = CompiledTimeMix(block.att), CompiledChannelMix(block.ffn)

    def __call__(
        self, x: Tensor, rows: Rows, state: BlockState | None
    ) -> tuple[Tensor, BlockState]:
        block = self.block
        att_shift, wkv, ffn_shift = state or (None, None, None)
        att_shift, ffn_shift = filled(att_shift, rows.count), filled(ffn_shift, rows.count)
        if block.first:
            x = block.ln0(x)
        normed = block.ln1(x)
        y, wkv = self.time_mix(normed, rows, att_shift, wkv)
        x = x + y
        normed_2 = block.ln2(x)
        x = x + self.channel_mix(normed_2, rows, ffn_shift)
        return x, BlockState(rows.last(normed), wkv, rows.last(normed_2))


class CompiledTimeMix:
    """The time mix, its low-rank matrices turned so that a row makes an output."""

    def __init__(self, att: TimeMix):
        self.att, self.config = att, att.config
        maa = (att.time_maa_w, att.time_maa_k, att.time_maa_v, att.time_maa_r, att.time_maa_g)
        self.maa_x = att.time_maa_x.flatten(0, 1)
        self.maa = torch.cat(maa).flatten(0, 1)
        self.w1 = att.time_maa_w1.T.contiguous()
        self.w2 = list(att.time_maa_w2.mT.contiguous())
        self.decay = att.time_decay.flatten()
        self.decay_w1 = att.time_decay_w1.T.contiguous()
        self.decay_w2 = att.time_decay_w2.T.contiguous()
        self.u = att.time_faaaa.float().contiguous()

    def __call__(
        self, x: Tensor, rows: Rows, shift: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (rows, C), the rows before and the state of each sequence -> output, new state."""
        att = self.att
        x_w, x_k, x_v, x_r, x_g = self.mixtures(x, rows, shift)
        low, r, k, v, gate = products(
            [x_w, x_r, x_k, x_v, x_g],
            [self.decay_w1, att.receptance, att.key, att.value, att.gate],
            [TANH, NONE, NONE, NONE, NONE],
        )
        w = products([low], [self.decay_w2], [NONE])[0].add_(self.decay)
        y, state = self.wkv(r, k, v, w, rows, state)
        y = torch.ops.finchtune.gated_norm(
            y, gate, att.ln_x.weight, att.ln_x.bias, att.ln_x.groups, att.ln_x.eps
        )
        return products([y], [att.output], [NONE])[0], state

    def mixtures(self, x: Tensor, rows: Rows, shift: Tensor | None) -> list[Tensor]:
        """The five inputs x_w, x_k, x_v, x_r, x_g, each (rows, C)."""
        ops, batch = torch.ops.finchtune, rows.batch(x)
        (blended,) = ops.token_mix(batch, shift, rows.cu_seqlens, self.maa_x)
        (low,) = products([blended], [self.w1], [TANH])
        blends = products(low.chunk(5, dim=1), self.w2, [NONE] * 5)
        ops.token_mix_(blends, batch, shift, rows.cu_seqlens, self.maa)
        return blends

    def wkv(
        self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, rows: Rows, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence over rows (rows, C)."""
        H, N = self.config.n_head, self.config.head_size
        if state is None or len(state) < rows.count:
            state = self.att.starting_state(state, rows.count)
            # Of its own memory: a step writes to it.
            state = torch.zeros(rows.count, H, N, N) if state is None else state.contiguous()
        if rows.cu_seqlens is None:
            return torch.ops.finchtune.wkv6_step_(r, k, v, w, self.u, state), state
        heads = [x.view(1, -1, H, N) for x in (r, k, v, w)]
        y, state, _ = torch.ops.finchtune.wkv6_forward(
            *heads, self.u, state, rows.cu_seqlens, False
        )
        return y.view(r.shape), state


class CompiledChannelMix:
    """The channel mix."""

    def __init__(self, ffn: ChannelMix):
        self.ffn = ffn
        self.maa = torch.cat([ffn.time_maa_k, ffn.time_maa_r]).flatten(0, 1)

    def __call__(self, x: Tensor, rows: Rows, shift: Tensor | None) -> Tensor:
        """x (rows, C), the row before each sequence -> output (rows, C)."""
        ops, ffn = torch.ops.finchtune, self.ffn
        x_k, x_r = ops.token_mix(rows.batch(x), shift, rows.cu_seqlens, self.maa)
        k, r = products([x_k, x_r], [ffn.key, ffn.receptance], [SQUARED_RELU, NONE])
        return ops.sigmoid_gate(r, products([k], [ffn.value], [NONE])[0])


def products(
    inputs: Sequence[Tensor], layers: Sequence[Tensor | nn.Module], activations: list[int]
) -> list[Tensor]:
    """activation(x W^T) of each input (rows, in) and layer, or matrix (out, in).

    Plain ones in one call; other layers, which have an adapter, one after another.
    """
    matrices = [weight_of(layer) for layer in layers]
    plain = [i for i, matrix in enumerate(matrices) if matrix is not None]
    if len(plain) == len(layers):
        return torch.ops.finchtune.products(inputs, matrices, activations)
    results: list[Tensor] = [torch.empty(0)] * len(layers)
    if plain:
        chosen = [inputs[i] for i in plain], [matrices[i] for i in plain]
        found = torch.ops.finchtune.products(*chosen, [activations[i] for i in plain])
        for i, y in zip(plain, found, strict=True):
            results[i] = y
    for i, layer in enumerate(layers):
        if matrices[i] is None:
            y = cast(nn.Module, layer)(inputs[i])
            results[i] = torch.relu(y).square_() if activations[i] == SQUARED_RELU else y
    return results


def weight_of(layer: Tensor | nn.Module) -> Tensor | None:
    """The matrix that is all there is to a layer, None if there is more."""
    if isinstance(layer, Tensor):
        return layer
    return layer.weight if isinstance(layer, nn.Linear) and layer.bias is None else None
