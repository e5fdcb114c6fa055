"""The WKV operators of all generations as torch's: single gradients, autocast, compiling."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import wkv6_cases, wkv7_cases
from helpers.wkv import evaluate, one_thread

from finchtune.ops.wkv6 import wkv6, wkv6_chunked, wkv6_reference
from finchtune.ops.wkv7 import wkv7, wkv7_chunked, wkv7_reference


@dataclass
class Operator:
    """An operator in its forms, the number of its inputs, and cases for it."""

    fastest: Any
    chunked: Any
    reference: Any
    n_inputs: int
    cases: Any


OPERATORS = {
    "wkv6": Operator(wkv6, wkv6_chunked, wkv6_reference, 6, wkv6_cases),
    "wkv7": Operator(wkv7, wkv7_chunked, wkv7_reference, 7, wkv7_cases),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture(autouse=True)
def quiet():
    with one_thread():
        yield


@pytest.mark.parametrize(
    ("name", "wanted"), [(name, i) for name, one in OPERATORS.items() for i in range(one.n_inputs)]
)
@pytest.mark.parametrize("output", [0, 1])
def test_one_input_and_one_output_alone(kernels, name, wanted, output):
    one = OPERATORS[name]
    inputs, _ = one.cases.oracle("typical", 1, 17, 2, 16)
    results = []
    for form, dtype in ((one.fastest, torch.float32), (one.reference, torch.float64)):
        leaves = [x.to(dtype) for x in inputs[: one.n_inputs]]
        leaves[wanted].requires_grad_()
        out = form(*leaves)[output]
        weight = inputs[one.n_inputs + output].to(dtype)
        results.append(
            torch.autograd.grad((out * weight).sum(), leaves[wanted], allow_unused=True)[0]
            if out.requires_grad
            else None
        )
    got, exact = results
    if exact is None:  # the final state depends neither on r nor on WKV6's u
        assert got is None or not got.any()
    else:
        assert (got - exact).abs().max() <= one.cases.FP32_TOLERANCE * exact.abs().max()


@every_operator
def test_thread_count_changes_no_bit(kernels, name):
    one = OPERATORS[name]
    inputs = one.cases.in_dtype(one.cases.make_inputs("typical", 2, 65, 3, 32), torch.float32)
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(evaluate(one.fastest, inputs))
    assert all(map(torch.equal, *results))


@every_operator
def test_autocast_leaves_the_operator_alone(kernels, name):
    """Under autocast the rows come as bf16 and w as fp32; the result is that of bf16 outside."""
    one = OPERATORS[name]
    inputs = one.cases.in_dtype(one.cases.make_inputs("typical", 2, 17, 2, 16), torch.bfloat16)
    inputs[3] = inputs[3].float() + 0.001
    for form in (one.fastest, one.chunked):

        def under_autocast(*arguments, form=form):
            with torch.autocast("cpu", torch.bfloat16):
                return form(*arguments)

        outside, inside = evaluate(form, inputs), evaluate(under_autocast, inputs)
        assert all(map(torch.equal, outside, inside))
        assert outside[5].dtype == torch.float32  # the gradient of w


@every_operator
def test_operators_keep_torchs_contract(kernels, name):
    cases, ops = OPERATORS[name].cases, torch.ops.finchtune
    forward, backward = (getattr(ops, f"{name}_{way}").default for way in ("forward", "backward"))
    for T, cu_seqlens in ((40, None), (70, torch.tensor([0, 66, 70], dtype=torch.int32))):
        n = 1 if cu_seqlens is None else 2
        made = cases.make_inputs("typical", 1, T, 2, 16, n_sequences=n)
        *inputs, grad_y, grad_state = cases.in_dtype(made, torch.float32)
        leaves = [x.clone().requires_grad_() for x in inputs]
        torch.library.opcheck(forward, (*leaves, cu_seqlens, True))
        torch.library.opcheck(forward, (*inputs, cu_seqlens, False))
        torch.library.opcheck(forward, (*leaves[:-1], None, cu_seqlens, True))
        for form in (inputs, [*inputs[:-1], None]):
            _, _, checkpoints = forward(*form, cu_seqlens, True)
            for grad in (grad_state, None):
                arguments = (*form, cu_seqlens, checkpoints, grad_y, grad)
                torch.library.opcheck(backward, arguments)


@every_operator
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("form", "dynamic", "lengths"),
    [("fastest", True, [17, 40]), ("fastest", False, [17]), ("chunked", False, [9])],
    ids=["kernel, any length", "kernel", "chunked"],
)
def test_torch_compile(kernels, name, form, dynamic, lengths, backend):
    torch._dynamo.reset()
    one = OPERATORS[name]
    form = getattr(one, form)
    compiled = torch.compile(form, fullgraph=True, backend=backend, dynamic=dynamic)
    for T in lengths:
        inputs, exact = one.cases.oracle("typical", 1, T, 2, 16)
        one.cases.assert_close(evaluate(compiled, one.cases.in_dtype(inputs, torch.float32)), exact)
