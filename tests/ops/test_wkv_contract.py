"""What the WKV operators of all generations do alike: states, packing, and as torch's operators."""

import pytest
import torch
from helpers.wkv import evaluate
from helpers.wkv_operators import OPERATORS, every_form, every_operator

pytestmark = pytest.mark.usefixtures("quiet")


def of_tokens(name, inputs, tokens):
    """Some tokens of the inputs, and those that every token has."""
    n_rows = OPERATORS[name].n_rows
    return [*(x[:, tokens] for x in inputs[:n_rows]), *inputs[n_rows:]]


@every_operator
@every_form
def test_packed_sequences(form, name):
    """Packed sequences (one of one token, one empty) equal separate ones, each with its state."""
    one, bounds = OPERATORS[name], [0, 70, 71, 71, 200]
    inputs = one.cases.make_inputs("typical", 1, 200, 2, 32, n_sequences=4)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    exact = evaluate(one.reference, inputs, cu_seqlens)
    inputs = one.cases.in_dtype(inputs, torch.float32)
    one.cases.assert_close(evaluate(form, inputs, cu_seqlens), exact)
    *others, state = inputs[: one.n_inputs]
    y, new_state = form(*others, state, cu_seqlens)
    for i in (0, 1, 3):
        part = slice(bounds[i], bounds[i + 1])
        own = form(*of_tokens(name, others, part), state[i : i + 1])
        torch.testing.assert_close((y[:, part], new_state[i : i + 1]), own)
    assert torch.equal(new_state[2], state[2])


@every_operator
@every_form
def test_a_sequence_in_parts_equals_the_whole(form, name):
    """Through the state that one call returns and the next one takes, gradients included."""
    cases = OPERATORS[name].cases
    inputs, exact = cases.oracle("typical", 2, 65, 2, 32)

    def in_parts(*arguments):
        *others, state, _ = arguments
        outputs = []
        for part in (slice(0, 1), slice(1, 40), slice(40, 65)):
            y, state = form(*of_tokens(name, others, part), state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    cases.assert_close(evaluate(in_parts, cases.in_dtype(inputs, torch.float32)), exact)


@every_operator
@every_form
def test_no_state_is_the_zero_state(form, name):
    cases = OPERATORS[name].cases
    inputs = cases.in_dtype(cases.make_inputs("typical", 2, 9, 2, 16), torch.float32)
    *others, state, _, _ = inputs
    assert all(map(torch.equal, form(*others), form(*others, torch.zeros_like(state))))


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
