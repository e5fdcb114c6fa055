"""Quantised base weights: exact codes, small storage, the adapters on them, and merging."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.adapted import quantised_and_dense
from helpers.contexts import gradients, long_batch, trainable
from helpers.elementwise_emulator import cuda_kernels_in_place
from helpers.support import every_generation, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from finchtune.adapters import (
    QuantisedLinear,
    QuantisedWeight,
    attach,
    merge,
    quantise_linears,
)
from finchtune.adapters.quantise import TABLES
from finchtune.errors import UserError
from finchtune.ops.kernels import cpu_standing_for

KINDS = ("nf4", "fp4", "int8", "fp8")
BITS = {"nf4": 4.5, "fp4": 4.5, "int8": 8.5, "fp8": 8.5}
METHOD_CASES = [
    ("bone", {"r": 4}),
    ("bat", {"r": 4}),
    ("lora", {"r": 2}),
    ("pissa", {"r": 2}),
    ("olora", {"r": 2}),
    ("disha", {"r1": 4, "r2": 4}),
    ("frozen_ft", {}),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


def values(kind: str) -> torch.Tensor:
    """Every value that a code can stand for."""
    if kind in TABLES:
        return torch.tensor(TABLES[kind]).unique()
    if kind == "int8":
        return torch.arange(-127.0, 128)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return every[every.isfinite()].unique()


@every_kind
@pytest.mark.parametrize("shape", [(3, 64), (5, 40), (7, 1), (2, 200)], ids=str)
def test_each_element_becomes_the_nearest_value_of_its_block(kind, shape):
    W = torch.randn(*shape)
    W.flatten()[:3] *= 5
    found = QuantisedWeight(W, kind).dense(torch.float32)
    table = values(kind)
    for block, got in zip(W.flatten().split(64), found.flatten().split(64), strict=True):
        scale = block.abs().max() / table.max()
        nearest = (block[:, None] / scale - table).abs().min(1).values
        error = (got - block).abs() / scale
        torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-6 * table.max())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gpu_kernel_gives_the_same_bits(kernels, kind, dtype):
    for shape in ((7, 1), (5, 40), (3, 64), (2, 200)):
        quantised = QuantisedWeight(torch.randn(*shape), kind)
        with cuda_kernels_in_place(), cpu_standing_for("cuda"):
            found = quantised.dense(dtype)
        assert torch.equal(found, quantised.dense(dtype))


@every_kind
def test_values_of_the_table_come_back_exactly(kind):
    table = values(kind)
    W = table[torch.randint(len(table), (6, 64))] * 2.0**-5
    W[:, 0] = table.max() * 2.0**-5
    assert torch.equal(QuantisedWeight(W, kind).dense(torch.float32), W)
    zero = torch.zeros(2, 64)
    assert torch.equal(QuantisedWeight(zero, kind).dense(torch.float32), zero)


def test_nf4_has_two_codes_in_a_byte_the_first_above():
    W = torch.tensor(TABLES["nf4"]).repeat(4).view(1, 64)
    weight = QuantisedWeight(W, "nf4")
    assert weight.codes[0, :8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]


@every_kind
def test_storage_is_small_and_outlives_a_change_of_dtype(kind):
    W = torch.randn(256, 192)
    weight = QuantisedWeight(W, kind)
    stored = sum(b.numel() * b.element_size() for b in weight.buffers())
    assert stored * 8 / W.numel() == BITS[kind]
    before = weight.dense(torch.float32)
    layer = nn.Sequential(nn.Linear(2, 2), weight).bfloat16()
    assert layer[0].weight.dtype == torch.bfloat16
    assert torch.equal(weight.dense(torch.float32), before)
    assert torch.equal(weight.dense(torch.bfloat16), before.bfloat16())
    with pytest.raises(UserError, match="NaN or infinity"):
        QuantisedWeight(torch.tensor([[1.0, float("nan")]]), kind)


def adapted(name, settings, kind, dtype=torch.float32):
    """A layer with a trained adapter on a quantised weight, and the same on the dense weight."""
    return quantised_and_dense(name, settings, kind, (40, 24), 1 / 4, dtype)


@every_kind
@pytest.mark.parametrize(("name", "settings"), METHOD_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_compute_as_on_the_dense_weight(name, settings, kind, dtype):
    layer, dense = adapted(name, settings, kind, dtype)
    x = torch.randn(2, 3, 40, dtype=dtype, requires_grad=True)
    inputs = [x, *layer.adapter.parameters()]
    y, expected = layer(x), dense(x)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, dy)
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected, inputs, dy)))
    again = checkpoint(layer, x, use_reentrant=False)
    assert all(map(torch.equal, gradients, torch.autograd.grad(again, inputs, dy)))


@pytest.mark.parametrize(("name", "settings"), METHOD_CASES)
def test_the_rebuilt_weight_is_not_kept_for_backward(name, settings):
    layer, _ = adapted(name, settings, "nf4")
    known = {t.untyped_storage().data_ptr() for t in [*layer.buffers(), *layer.parameters()]}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    x = torch.randn(3, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert all(size <= x.numel() for size in kept), kept


@every_kind
@every_generation
@pytest.mark.parametrize("grad_checkpoint", [0, 1, 2])
def test_states_are_trained_through_a_quantised_base(kind, generation, grad_checkpoint):
    """Their gradients are those of a model that has the weights which the codes stand for."""
    model = trainable("state", torch.float64, grad_checkpoint, generation)
    plain, dense = copy.deepcopy(model), copy.deepcopy(model)
    quantise_linears(model, kind)
    quantised = {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    assert len(quantised) == 2 * {6: 8, 7: 6}[generation]
    for name, layer in quantised.items():
        dense.get_submodule(name).weight.data = layer.weight.dense(torch.float64)
    for one in (model, dense, plain):
        one.loss(*long_batch("packed"))[0].backward()
    expected, other = gradients(dense), gradients(plain)
    assert gradients(model).keys() == expected.keys() == model.initial_states().keys()
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, expected[name]) < 1e-10, name
        assert relative_error(gradient, other[name]) > 1e-3, name


@every_kind
def test_merging_uses_the_weight_that_training_saw(kind):
    model = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 24))
    attach(model, "bat", r=8, quant=kind)
    assert model.adapter_spec["quant"] == kind
    assert "0.weight" not in model.state_dict()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.adapter.bone.normal_().div_(8)
    x = torch.randn(5, 40)
    expected = model(x)
    W = model[0].weight.dense(torch.float32)
    merge(model)
    assert not torch.equal(model[0].weight, W)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("dora", {"r": 2}), ("bat", {"r": 4, "mode": "col"}), ("lora_ga", {"r": 2, "init": False})],
)
def test_methods_that_need_the_weight_itself_are_refused(method, settings):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UserError, match=f"{method} needs the weights themselves"):
        attach(model, method, quant="nf4", **settings)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(("name", "settings"), METHOD_CASES[:2])
def test_a_quantised_layer_compiles_as_one_graph(name, settings):
    layer, dense = adapted(name, settings, "nf4")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 40, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, dense(x))
    inputs = [x, *layer.adapter.parameters()]
    found = torch.autograd.grad(y.sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(dense(x).sum(), inputs))


def test_the_error_grows_as_the_bits_shrink():
    W = torch.randn(64, 256)
    errors = {
        kind: F.mse_loss(QuantisedWeight(W, kind).dense(torch.float32), W).sqrt() for kind in KINDS
    }
    assert errors["int8"] < errors["fp8"] < errors["nf4"] < 0.11
    assert errors["nf4"] < errors["fp4"] < 0.13
