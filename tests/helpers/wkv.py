"""What the tests of the WKV operators share: evaluating a form, and comparing with the oracle."""

from contextlib import contextmanager

import torch
from helpers.support import cpu_path_in_use

CPU_PATHS = ["avx512", "avx2", "portable"]


@contextmanager
def one_thread():
    """Tensors this small only lose time when threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def named_form(request, operator, chunked):
    """`chunked`, or `operator` by the named form of the CPU kernels, if this processor has it."""
    if request.param == "chunked":
        yield chunked
        return
    request.getfixturevalue("kernels")
    with cpu_path_in_use(request.param):
        yield operator


def evaluate(form, inputs, cu_seqlens=None):
    """y, the final state and the gradients of all inputs; `inputs` ends with those of the two."""
    *leaves, grad_y, grad_state = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    y, state = form(*leaves, cu_seqlens)
    gradients = torch.autograd.grad([y, state], leaves, [grad_y, grad_state])
    return [y.detach(), state.detach(), *gradients]


def errors(names, got, exact):
    """Largest error over the largest value, for each output; against an exact zero, the error."""
    scales = [b.abs().max() if b.any() else 1 for b in exact]
    pairs = zip(names, got, exact, scales, strict=True)
    return {name: ((a - b).abs().max() / scale).item() for name, a, b, scale in pairs}


def rms(names, got, exact):
    """Root mean square of the error of each output, over that of the output."""
    pairs = zip(names, got, exact, strict=True)
    return {
        name: ((a - b).square().mean() / b.square().mean()).sqrt().item() for name, a, b in pairs
    }
