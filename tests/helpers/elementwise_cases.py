"""The element-wise parts of a block, with shapes of their inputs."""

import torch

from finchtune.ops.elementwise import (
    BonusNorm,
    GatedNorm,
    LowRank,
    fixed_mixtures,
    low_ranks,
    mixtures,
    sigmoid_gate,
    squared_relu,
    wkv7_inputs,
)

HEADS = 3


def gated_norm(y, gate, weight, bias):
    return with_leaves(GatedNorm, weight, bias)(y, gate)


def bonus_norm(y, r, k, v, gate, weight, bias, r_k):
    return with_leaves(BonusNorm, weight, bias)(y, r, k, v, gate, r_k)


def with_leaves(Norm, weight, bias):
    norm = Norm(HEADS, len(weight), eps=64e-5)
    del norm.weight, norm.bias  # the leaves themselves take their place
    norm.weight, norm.bias = weight, bias
    return norm


def first_inputs(k, decay, rate, k_k, k_a):
    """Those of the first block, where v stays as it is."""
    key, _, *rest = wkv7_inputs(k, k.detach(), decay, rate, k_k, k_a, HEADS)
    return key, *rest


def all_inputs(k, v, decay, rate, first, mix, k_k, k_a):
    return wkv7_inputs(k, v, decay, rate, k_k, k_a, HEADS, [first, mix])


def three_low_ranks(x, one, two, zero, z, other_one, other_two, third_one):
    parts = [LowRank(x, one, two, zero, "tanh"), LowRank(z, other_one, other_two)]
    return low_ranks(*parts, LowRank(x, third_one, two, None, "sigmoid"))


def packed(function, cu_seqlens):
    return lambda x, *weights: function(x, None, torch.tensor(cu_seqlens), *weights)


def following(function):
    return lambda x, before, *weights: function(x, before, None, *weights)


def starting(function):
    return lambda x, *weights: function(x, None, None, *weights)


# C is 45 or 100: whole vectors and a rest, for every width of vector on a CPU; on a GPU, where a
# row is all of one kind, single elements and, with 48 and 64, vectors.
LOW_RANK = [(1, 45), (5, 45), (45, 15), (5, 3, 45)]
WIDE_LOW_RANK = [(1, 48), (5, 48), (48, 15), (5, 3, 48)]
CASES = {
    "mixtures": (starting(mixtures), [(2, 7, 45), *LOW_RANK]),
    "mixtures after a state": (following(mixtures), [(2, 7, 45), (2, 45), *LOW_RANK]),
    "mixtures of packed rows": (packed(mixtures, [0, 1, 1, 5, 7]), [(1, 7, 45), *LOW_RANK]),
    "mixtures of one token": (following(mixtures), [(3, 1, 45), (3, 45), *LOW_RANK]),
    "fixed mixtures": (starting(fixed_mixtures), [(2, 7, 100), (2, 100)]),
    "fixed mixtures after a state": (following(fixed_mixtures), [(2, 7, 45), (2, 45), (2, 45)]),
    "fixed mixtures of packed rows": (packed(fixed_mixtures, [0, 3, 7]), [(1, 7, 45), (2, 45)]),
    "low ranks": (
        three_low_ranks,
        [(9, 45), (45, 6), (6, 45), (45,), (2, 3, 15), (15, 4), (4, 45), (45, 6)],
    ),
    "gated norm": (gated_norm, [(9, 60), (9, 60), (60,), (60,)]),
    "squared ReLU": (squared_relu, [(3, 5, 101)]),
    "mixtures of whole vectors": (following(mixtures), [(2, 70, 48), (2, 48), *WIDE_LOW_RANK]),
    "gated norm of whole vectors": (gated_norm, [(70, 192), (70, 192), (192,), (192,)]),
    "sigmoid gate of whole vectors": (sigmoid_gate, [(7, 5, 64), (7, 5, 64)]),
    "inputs of WKV7": (all_inputs, [(2, 7, 60)] * 6 + [(60,)] * 2),
    "inputs of WKV7 in the first block": (first_inputs, [(9, 45)] * 3 + [(45,)] * 2),
    "inputs of WKV7 of whole vectors": (all_inputs, [(70, 192)] * 6 + [(192,)] * 2),
    "bonus norm": (bonus_norm, [(9, 72)] * 5 + [(72,)] * 3),
    "bonus norm of uneven heads": (bonus_norm, [(9, 45)] * 5 + [(45,)] * 3),
    "bonus norm of whole vectors": (bonus_norm, [(70, 192)] * 5 + [(192,)] * 3),
    "sigmoid gate": (sigmoid_gate, [(3, 5, 101), (3, 5, 101)]),
}


def outputs_and_gradients(function, inputs, seed=1):
    """All outputs, then the gradients of all inputs for random gradients of the outputs."""
    found = function(*inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    wanted = [x for x in inputs if x.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, upstream)]


def random_inputs(shapes, dtype):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def assert_threads_change_no_bit(function, inputs):
    """One, two and three threads give the same outputs and gradients."""
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(outputs_and_gradients(function, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
