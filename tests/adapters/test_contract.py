"""What every adapter method must hold, checked against its formula written out in plain loops."""

import pytest
import torch
import torch.nn.functional as F
from helpers.adapter_formulas import CASES, FORMULAS, formula, make, small, start
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from finchtune.adapters import METHODS, AdaptedLinear, Adapter, shards
from finchtune.adapters.frozen import product_plus
from finchtune.adapters.methods import bat
from finchtune.errors import UserError

SIZES = [(12, 8), (8, 12), (8, 8)]
"""(out, in): wider, taller and square."""

every_case = pytest.mark.parametrize(
    ("name", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else str(v)
)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty gives NaN, so that whatever is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_every_method_has_a_formula():
    assert FORMULAS.keys() == METHODS.keys()


@every_case
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients_are_the_formulas(name, settings, size):
    adapter, W = make(name, settings, *size)
    x = torch.randn(2, 3, W.shape[1], dtype=W.dtype, requires_grad=True)
    dy = torch.randn(2, 3, W.shape[0], dtype=W.dtype)
    inputs = {"x": x, **dict(adapter.named_parameters())}
    y = adapter(x, W)
    expected = x @ formula(name)(adapter, W).T
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y, inputs.values(), dy)
    wanted = torch.autograd.grad(expected, inputs.values(), dy)
    for key, gradient, want in zip(inputs, gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, msg=lambda text, key=key: f"{key}: {text}")


@every_case
@pytest.mark.parametrize(("size", "power"), [*((size, 3) for size in SIZES), ((8, 8), 1)], ids=str)
def test_second_derivatives_are_those_of_the_formula(name, settings, size, power):
    """At power 1 the gradient that comes in depends on nothing."""
    adapter, W = make(name, settings, *size)
    x = torch.randn(3, W.shape[1], dtype=W.dtype, requires_grad=True)
    inputs = [x, *adapter.parameters()]

    def second(y):
        first = torch.autograd.grad(y.pow(power).sum(), inputs, create_graph=True)
        return torch.autograd.grad(
            sum(g.pow(2).sum() for g in first), inputs, materialize_grads=True
        )

    torch.testing.assert_close(second(adapter(x, W)), second(x @ formula(name)(adapter, W).T))


@every_case
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_merged_weight_gives_the_forward(name, settings, size):
    adapter, W = make(name, settings, *size)
    x = torch.randn(5, W.shape[1], dtype=W.dtype)
    merged = adapter.merged(W)
    assert merged.dtype == W.dtype
    assert not merged.requires_grad
    torch.testing.assert_close(F.linear(x, merged), adapter(x, W))


@every_case
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_some_rows_are_merged_as_the_whole_is(name, settings, size):
    adapter, W = make(name, settings, *size)
    if not adapter.output_dims:
        return
    part = adapter.of_outputs(2, 5)
    assert (part.out_features, adapter.out_features) == (3, size[0])
    torch.testing.assert_close(part.merged(W[2:5]), adapter.merged(W)[2:5])


@every_case
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_a_lora_says_so_exactly(name, settings, size):
    adapter, W = make(name, settings, *size)
    refuses = type(adapter).low_rank is Adapter.low_rank
    if name in FORMULAS:
        assert refuses == (name in ("bat", "dora", "frozen_ft"))
    if refuses:
        with pytest.raises(UserError, match=f"what {name} adds is no LoRA; merge it"):
            adapter.low_rank()
        return
    A, B, scale = adapter.low_rank()
    assert A.shape == (len(A), size[1])
    assert B.shape == (size[0], len(A))
    torch.testing.assert_close(W + scale * B @ A.to(B.dtype), adapter.merged(W))


@every_case
def test_merging_is_done_in_float32(name, settings):
    adapter, W = make(name, settings, dtype=torch.float32)
    merged = adapter.bfloat16().merged(W.bfloat16())
    assert merged.dtype == torch.float32
    exact = adapter.double().merged(W.bfloat16().double())
    torch.testing.assert_close(merged.double(), exact, rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_the_base_and_leaves_W_alone(name, settings, dtype):
    W = nn.Parameter(torch.randn(12, 8).to(dtype), requires_grad=False)
    before = W.clone()
    adapter = METHODS[name](8, 12, **settings)
    start(adapter, W)
    x = torch.randn(2, 3, 8).to(dtype)
    assert torch.equal(adapter(x, W), F.linear(x, W))
    assert torch.equal(W, before)
    assert torch.equal(adapter.merged(W).to(dtype), W)


@pytest.mark.parametrize(
    ("module", "mode", "elements", "count"),
    [(shards, "row", 1, 10), (shards, "row", 36, 4), (bat, "col", 1, 6), (bat, "col", 640, 2)],
)
def test_bat_goes_through_large_weights_in_groups(module, mode, elements, count, monkeypatch):
    adapter, W = make("bat", {"r": 4, "mode": mode}, 24, 40)
    x = torch.randn(3, 40, dtype=W.dtype, requires_grad=True)
    inputs = [x, adapter.bone]
    expected = adapter(x, W)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    monkeypatch.setitem(module.GROUP_ELEMENTS, "cpu", elements)
    length = 3 if mode == "row" else 40
    assert len(shards.groups(adapter.bone, length, module.GROUP_ELEMENTS)) == count
    y = adapter(x, W)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), inputs), wanted)


@every_case
def test_any_leading_shape_and_stride(name, settings):
    adapter, W = make(name, settings)
    weight = adapter.merged(W)
    wide = torch.randn(4, 3, 16, dtype=W.dtype)
    for x in (
        wide[0, 0, :8],
        wide[:0, 0, :8],
        wide[:, 0, :8],
        wide[..., ::2],
        wide[..., :8].mT.contiguous().mT,
        wide[None, ..., :8],
    ):
        torch.testing.assert_close(adapter(x, W), F.linear(x, weight))


@every_case
@pytest.mark.parametrize("own_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_is_as_exact_as_building_the_weight(name, settings, own_dtype):
    """The error in bfloat16: at most twice that of the formula, three times for gradients."""
    adapter, W = make(name, settings, 24, 32, dtype=torch.float32)
    adapter, W = adapter.bfloat16().to(own_dtype), W.bfloat16()
    x = torch.randn(128, 32, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(128, 24, dtype=torch.bfloat16)

    def run(forward, x, W, dy):
        y = forward(x, W)
        return [y, *torch.autograd.grad(y, [x, *adapter.parameters()], dy)]

    low = run(adapter, x, W, dy)
    assert [t.dtype for t in low] == [torch.bfloat16] * 2 + [own_dtype] * (len(low) - 2)
    adapter.bfloat16()
    plain = run(lambda x, W: F.linear(x, formula(name)(adapter, W)), x, W, dy)
    adapter.double()
    exact = run(adapter, x.double(), W.double(), dy.double())
    for factor, got, other, want in zip([2] + [3] * 9, low, plain, exact, strict=False):
        assert (got - want).norm() <= factor * (other - want).norm()


@every_case
def test_autocast_computes_in_its_dtype(name, settings):
    adapter, W = make(name, settings, dtype=torch.float32)
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x, W)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in [x, *adapter.parameters()])


@every_case
def test_works_on_the_meta_device(name, settings):
    with torch.device("meta"):
        adapter = METHODS[name](8, 12, **settings)
        start(adapter, torch.empty(12, 8))
        assert adapter(torch.empty(5, 8), torch.empty(12, 8)).shape == (5, 12)
    assert all(tensor.is_meta for tensor in adapter.state_dict().values())


@every_case
def test_only_adapter_tensors_train(name, settings):
    adapter, W = make(name, settings, dtype=torch.float32)
    linear = nn.Linear(8, 12)
    linear.weight = nn.Parameter(W)
    layer = AdaptedLinear(linear, adapter)
    layer(torch.randn(4, 8)).square().sum().backward()
    assert layer.weight is linear.weight
    assert layer.weight.grad is None
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@every_case
def test_files_stay_unambiguous(name, settings):
    adapter, _ = make(name, settings)
    assert not {"weight", "bias"} & adapter.state_dict().keys()
    assert not any("." in key for key in adapter.state_dict())


@every_case
def test_recomputing_activations_changes_nothing(name, settings):
    adapter, W = make(name, settings)
    x = torch.randn(5, 8, dtype=W.dtype, requires_grad=True)
    inputs = [x, *adapter.parameters()]
    plain = torch.autograd.grad(adapter(x, W).square().sum(), inputs)
    again = checkpoint(adapter, x, W, use_reentrant=False).square().sum()
    torch.testing.assert_close(torch.autograd.grad(again, inputs), plain, rtol=0, atol=0)


@every_case
def test_weights_may_be_released_between_forward_and_backward(name, settings):
    """As ZeRO-3 does: full tensors only while the module that holds them runs."""
    adapter, W = make(name, settings)
    linear = nn.Linear(8, 12, dtype=W.dtype)
    linear.weight = nn.Parameter(W)
    layer = AdaptedLinear(linear, adapter)
    x = torch.randn(5, 8, dtype=W.dtype, requires_grad=True)
    inputs = [x, *adapter.parameters()]
    plain = torch.autograd.grad(layer(x).square().sum(), inputs)

    full = {p: p.data for p in layer.parameters()}

    def gather(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = full[parameter].clone()

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=W.dtype)

    for module in layer.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        module.register_full_backward_pre_hook(gather)
        release(module)
    loss = layer(x).square().sum()
    assert layer.weight.numel() == 0
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), plain)


@pytest.mark.parametrize("name", METHODS)
def test_compiles_as_one_graph(name):
    adapter, W = make(name, small(name))
    layer = AdaptedLinear(nn.Linear(8, 12, dtype=W.dtype), adapter)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 8, dtype=W.dtype, requires_grad=True)
    inputs = [x, *adapter.parameters()]
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y, inputs, torch.ones_like(y))
    wanted = torch.autograd.grad(expected, inputs, torch.ones_like(y))
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("rows", [4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_of_two_products(rows, dtype):
    s, x, W = (torch.randn(n, k).to(dtype) for n, k in ((5, 4), (5, 8), (12, 8)))
    D = torch.randn(rows, 12).to(dtype) if rows else None
    torch.library.opcheck(torch.ops.finchtune.product_plus, (s, D, x, W))
    other = s @ D if rows else torch.cat([s] * 3, 1)
    with FlopCounterMode(display=False) as counter:
        y = product_plus(s, D, x, W, None, None)
    torch.testing.assert_close(y, other + x @ W.T, rtol=2e-2, atol=2e-2)
    assert counter.get_total_flops() == 2 * 5 * 12 * (8 + (rows or 0))
