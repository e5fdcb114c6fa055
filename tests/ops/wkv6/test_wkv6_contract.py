"""WKV6 as a torch operator: what is saved, and wrong arguments."""

import pytest
import torch
from helpers.wkv import one_thread
from helpers.wkv6_cases import make_inputs

from finchtune.errors import UserError
from finchtune.ops.wkv6 import wkv6


@pytest.fixture(autouse=True)
def quiet():
    with one_thread():
        yield


def test_without_a_state_none_is_saved(kernels):
    """A zero state, and its gradient, would be traffic for nothing in every layer."""
    *rows, u, _, _, _ = make_inputs("typical", 2, 20, 2, 16)
    leaves = [x.float().requires_grad_() for x in (*rows, u)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        y, state = wkv6(*leaves)
    assert saved.count(state.shape) == 1  # the checkpoints: at most one state of each sequence
    expected, _ = wkv6(*leaves, torch.zeros(2, 2, 16, 16))
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(out.sum(), leaves) for out in (y, expected)]
    assert all(map(torch.equal, *gradients))


def replaced(index, tensor):
    """Arguments that fit, but for one."""
    torch.manual_seed(0)
    arguments = [*torch.randn(4, 2, 5, 2, 8).unbind(), torch.randn(2, 8), None, None]
    arguments[index] = tensor
    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (replaced(0, torch.zeros(2, 5, 16)), "r must be"),
        (replaced(0, torch.zeros(2, 0, 2, 8)), "not empty"),
        (replaced(0, torch.zeros(2, 5, 2, 8, dtype=torch.int64)), "r must be bf16"),
        (replaced(1, torch.zeros(2, 5, 1, 8)), "k must be"),
        (replaced(2, torch.zeros(2, 5, 2, 8).double()), "use one dtype"),
        (replaced(3, torch.zeros(2, 5, 2, 8, dtype=torch.int32)), "w must be floating"),
        (replaced(4, torch.zeros(8)), "u must be"),
        (replaced(5, torch.zeros(2, 2, 8)), "state must be"),
        (replaced(5, torch.zeros(2, 2, 8, 8, device="meta")), "state is on meta"),
        (replaced(6, torch.tensor([0, 5])), "a batch of 1"),
    ],
)
def test_wrong_arguments_are_told(arguments, message):
    with pytest.raises(UserError, match=message):
        wkv6(*arguments)


@pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 3, 2, 5], [0], [0.0, 5.0]])
def test_wrong_boundaries_are_told(bounds):
    x, u = torch.zeros(1, 5, 2, 8), torch.zeros(2, 8)
    with pytest.raises(UserError, match="cu_seqlens"):
        wkv6(x, x, x, x, u, cu_seqlens=torch.tensor(bounds))
