"""WKV6 as a torch operator: autocast, torch.compile, what is saved, and wrong arguments."""

import pytest
import torch
from helpers.wkv import evaluate, one_thread
from helpers.wkv6_cases import assert_close, in_dtype, make_inputs, oracle

from finchtune.errors import UserError
from finchtune.ops.wkv6 import wkv6, wkv6_chunked


@pytest.fixture(autouse=True)
def quiet():
    with one_thread():
        yield


def test_autocast_leaves_the_operator_alone(kernels):
    """Under autocast r, k, v come as bf16 and w as fp32; the result is that of bf16 outside."""
    inputs = in_dtype(make_inputs("typical", 2, 17, 2, 16), torch.bfloat16)
    inputs[3] = inputs[3].float() + 0.001
    for form in (wkv6, wkv6_chunked):

        def under_autocast(*arguments, form=form):
            with torch.autocast("cpu", torch.bfloat16):
                return form(*arguments)

        outside, inside = evaluate(form, inputs), evaluate(under_autocast, inputs)
        assert all(map(torch.equal, outside, inside))
        assert outside[5].dtype == torch.float32


def test_operators_keep_torchs_contract(kernels):
    for T, cu_seqlens in ((40, None), (70, torch.tensor([0, 66, 70], dtype=torch.int32))):
        n = 1 if cu_seqlens is None else 2
        made = make_inputs("typical", 1, T, 2, 16, n_sequences=n)
        *inputs, grad_y, grad_state = in_dtype(made, torch.float32)
        leaves = [x.clone().requires_grad_() for x in inputs]
        ops = torch.ops.finchtune
        torch.library.opcheck(ops.wkv6_forward.default, (*leaves, cu_seqlens, True))
        torch.library.opcheck(ops.wkv6_forward.default, (*inputs, cu_seqlens, False))
        torch.library.opcheck(ops.wkv6_forward.default, (*leaves[:-1], None, cu_seqlens, True))
        for form in (inputs, [*inputs[:-1], None]):
            _, _, checkpoints = ops.wkv6_forward(*form, cu_seqlens, True)
            for grad in (grad_state, None):
                arguments = (*form, cu_seqlens, checkpoints, grad_y, grad)
                torch.library.opcheck(ops.wkv6_backward.default, arguments)


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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("form", "dynamic", "lengths"),
    [(wkv6, True, [17, 40]), (wkv6, False, [17]), (wkv6_chunked, False, [9])],
    ids=["kernel, any length", "kernel", "chunked"],
)
def test_torch_compile(kernels, form, dynamic, lengths, backend):
    torch._dynamo.reset()
    compiled = torch.compile(form, fullgraph=True, backend=backend, dynamic=dynamic)
    for T in lengths:
        inputs, exact = oracle("typical", 1, T, 2, 16)
        assert_close(evaluate(compiled, in_dtype(inputs, torch.float32)), exact)


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
