"""The element-wise CUDA kernels, emulated: the order in which threads run changes no bit."""

import itertools

import pytest
import torch
from helpers.elementwise_emulator import cuda_kernels_in_place, emulation_configure
from helpers.emulation import ORDERS


def results() -> list[torch.Tensor]:
    """Of every kernel whose threads share memory or sums, on the same inputs."""
    torch.manual_seed(0)
    ops = torch.ops.finchtune
    x = torch.randn(2, 40, 48)
    maa, y, gate = torch.randn(3, 48), torch.randn(70, 48), torch.randn(70, 48)
    douts = [torch.randn(80, 48) for _ in range(3)]
    norm = y, gate, maa[0], maa[1], 3, 1e-5
    D = torch.randn(3, 16, 16)
    logits, labels = torch.randn(3, 700), torch.randint(700, (3,))
    return [
        *ops.token_mix_backward(douts, x, None, None, maa, [], True),
        *ops.gated_norm_backward(torch.randn(70, 48), *norm, True),
        *ops.wkv7_inputs_backward(
            [y] * 5, [y, gate, y], [gate, y, gate], list(maa[:2]), 3, 1e-12, True
        ),
        *ops.bonus_norm_backward(y, [y, gate, y, gate, y], list(maa), 3, 1e-5, True),
        ops.shard_sums(y, 7, torch.float32),
        *ops.bat_row_forward(y, D),
        ops.cross_entropy_(logits, labels, 0.1),
        logits,
    ]


@pytest.fixture
def emulation(kernels):
    with cuda_kernels_in_place():
        yield
    emulation_configure(0, False, 1, 8)


def test_every_thread_schedule_gives_the_same_bits(emulation):
    """A missing barrier shows as a difference, or as NaN, in at least one of them."""
    runs = []
    for order, eager in itertools.product(range(len(ORDERS)), (False, True)):
        emulation_configure(order, eager, 1, 8)
        runs.append(results())
    for run in runs:
        assert all(x.isfinite().all() for x in run)
        assert all(map(torch.equal, run, runs[0]))
