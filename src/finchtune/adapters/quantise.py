"""Frozen weights in 8 or 4 bits: the same numbers on every device."""

import functools
import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from finchtune.adapters.fp8 import E4M3, LARGEST_E4M3, check_fp8, over_scales, to_e4m3
from finchtune.errors import UserError
from finchtune.ops.kernels import has_kernels
from finchtune.ops.kernels.devices import are_set_aside, device_type

BLOCK = 64  # consecutive elements of a weight, row by row, that share a scale
CHUNK_BLOCKS = 2**16  # blocks converted at a time, which bounds the temporary tensors
BY_ROW = "fp8_compute"  # the form whose rows have one scale each, and that products are made in

# The 16 values of QLoRA's NormalFloat (arXiv 2305.14314, appendix E): quantiles of a normal
# distribution scaled to [-1, 1], with an exact zero.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# bitsandbytes' 4-bit floats: a sign, two bits of exponent and one of mantissa, over the largest.
FP4_HALF = (1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)
FP4 = (*(-value for value in reversed(FP4_HALF)), 0.0, *FP4_HALF, 1.0)
TABLES = {"nf4": NF4, "fp4": FP4}
"""The 16 values of each 4-bit form, rising; fp4 has one of them twice and never uses the last."""
LARGEST = {"nf4": 1.0, "fp4": 1.0, "int8": 127.0, "fp8": LARGEST_E4M3, BY_ROW: LARGEST_E4M3}
"""The value that each form gives the largest element of a block; its keys are the forms."""

Form = tuple[str, torch.Size]
"""The kind of a quantised weight, and its shape (out, in)."""


class QuantisedWeight(nn.Module):
    """A frozen weight (out, in) as codes and one float32 scale for each block of 64.

    An element is its code's value times the scale of its block: for "nf4" one of 16 values (two
    codes in a byte, the first in the upper half), for "fp4" one of 15 in the same way, for "int8" a
    whole number up to 127, for "fp8" an e4m3 number up to 448. The scale is the block's largest
    magnitude over the largest value; codes are the nearest value, a tie in nf4 and fp4 the lower
    and otherwise the even one. "fp8_compute" is "fp8" with one scale for each row.

    The buffers are no floating-point tensors, so that a change of the model's dtype leaves them.
    Raises UserError for a weight with NaN or infinity, and for "fp8_compute" where a layer's sizes
    or the device do not go with products in fp8.
    """

    codes: Tensor
    scales: Tensor
    requires_grad = False

    def __init__(self, W: Tensor, kind: str, device: torch.device | None = None) -> None:
        """Quantise W (out, in), on `device` if given: the codes are the same, and stay there."""
        super().__init__()
        if kind not in LARGEST:
            raise UserError(f"a weight is quantised to {', '.join(LARGEST)}, not to {kind!r}")
        if kind == BY_ROW:
            check_fp8(W.shape, device or W.device)
        self.form: Form = (kind, W.shape)
        self.shape, self.dtype = W.shape, W.dtype
        codes, scales = quantise(W.detach().to(device=device), kind)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales.view(torch.int32), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def leave_fp8(self) -> None:
        """Make "fp8_compute" the same weight as "fp8", by which products round no activations."""
        kind, shape = self.form
        if kind == BY_ROW:
            self.scales, self.form = of_blocks(self.scales, self.form), ("fp8", shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the codes stand for."""
        return dequantise(self.codes, self.scales, self.form, dtype)


@functools.cache
def code_table(kind: str) -> Tensor | None:
    """What each code stands for, 16 or 256 values in float32; None where it is the value itself."""
    if kind in TABLES:
        return torch.tensor(TABLES[kind])
    every = torch.arange(256).to(torch.uint8)
    return None if kind == "int8" else decode(every.view(-1, BLOCK), kind).flatten()


def quantise(W: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """W (out, in) -> codes (blocks, 32 bytes for 4-bit forms, else 64), scales float32.

    A scale for each block, or for each row.
    """
    width = W.shape[1] if kind == BY_ROW else BLOCK  # elements that share a scale
    if W.is_meta:  # shapes alone, at once
        count, bytes_of = -(-W.numel() // BLOCK), BLOCK // 2 if kind in TABLES else BLOCK
        dtype = torch.int8 if kind == "int8" else torch.uint8
        factors = W.new_empty(-(-W.numel() // width), dtype=torch.float32)
        return W.new_empty(count, bytes_of, dtype=dtype), factors
    flat = W.reshape(-1)
    whole = len(flat) // width * width
    chunk = max(1, CHUNK_BLOCKS * BLOCK // width)
    codes, scales = [], []
    parts = [*flat[:whole].view(-1, width).split(chunk)] if whole else []
    if whole < len(flat):
        parts.append(nn.functional.pad(flat[whole:], (0, whole + BLOCK - len(flat))).view(1, -1))
    for part in parts:
        scaled, scale = over_scales(part.float(), LARGEST[kind])
        if not scale.isfinite().all():
            raise UserError("a weight with NaN or infinity cannot be quantised")
        codes.append(encode(scaled.view(-1, BLOCK), kind))
        scales.append(scale.squeeze(1))
    return torch.cat(codes), torch.cat(scales)


def of_blocks(scales: Tensor, form: Form) -> Tensor:
    """The scale of each block."""
    kind, shape = form
    return scales.repeat_interleave(shape[1] // BLOCK) if kind == BY_ROW else scales


def encode(values: Tensor, kind: str) -> Tensor:
    """Scaled values (blocks, 64) float32 -> codes."""
    if kind == "int8":
        return values.round().clamp(-127, 127).to(torch.int8)
    if kind in ("fp8", BY_ROW):
        return to_e4m3(values).view(torch.uint8)
    table = torch.tensor(TABLES[kind], device=values.device)
    codes = torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes[:, 0::2] * 16 + codes[:, 1::2]


def dequantise(codes: Tensor, scales: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """Codes and scales (the bits of float32 in int32) -> the weight (out, in) in `dtype`."""
    kind, shape = form
    scales = of_blocks(scales, form)
    if device_type(codes) == "cuda" and not are_set_aside() and has_kernels("cuda"):
        return torch.ops.finchtune.unpack(codes, scales, TABLES.get(kind, ()), *shape, dtype)
    factors = scales.view(torch.float32).unsqueeze(1)
    dense = torch.empty(len(codes), BLOCK, dtype=dtype, device=codes.device)
    starts = range(0, len(codes), CHUNK_BLOCKS)
    if isinstance(codes, FakeTensor):
        starts = starts[:1]  # whoever counts memory learns from one part what all take
    for start in starts:
        part = slice(start, start + CHUNK_BLOCKS)
        dense[part] = (decode(codes[part], kind) * factors[part]).to(dtype)
    return dense.view(-1)[: math.prod(shape)].view(shape)


def decode(codes: Tensor, kind: str) -> Tensor:
    """Codes -> the values (blocks, 64) that they stand for, float32."""
    if kind == "int8":
        return codes.float()
    if kind in ("fp8", BY_ROW):
        return codes.view(E4M3).float()
    table = torch.tensor(TABLES[kind], device=codes.device)
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # of each byte
    return pairs.index_select(0, codes.flatten().int()).view(-1, BLOCK)
