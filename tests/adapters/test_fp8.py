"""Products in fp8 against the same rounded factors in float64, and the adapters on them."""

import pytest
import torch
from helpers.adapted import quantised_and_dense
from helpers.support import relative_error, small_model
from torch import nn

from finchtune.adapters import QuantisedWeight, attach, fp8, merge
from finchtune.adapters.fp8 import fp8_product, fp8_product_back, rounded_rows
from finchtune.errors import UserError

KIND = "fp8_compute"
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
METHOD_CASES = [
    ("bone", {"r": 16}),
    ("bat", {"r": 16}),
    ("lora", {"r": 4}),
    ("pissa", {"r": 4}),
    ("disha", {"r1": 16, "r2": 16}),
    ("frozen_ft", {}),
]


def exact(codes, scales):
    """What e4m3 rows stand for, in float64."""
    return codes.view(torch.float8_e4m3fn).double() * scales.double().view(-1, 1)


@every_dtype
def test_rows_are_rounded_to_the_nearest_of_their_values(dtype):
    x = (torch.randn(9, 64) * torch.logspace(-3, 3, 9).unsqueeze(1)).to(dtype)
    x[3] = 0
    codes, scales = rounded_rows(x)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = table[table.isfinite()]
    for row, own, scale in zip(x.double(), exact(codes, scales), scales.double(), strict=True):
        nearest = (row.unsqueeze(1) - table * scale).abs().min(1).values
        torch.testing.assert_close((own - row).abs(), nearest, rtol=1e-4, atol=1e-6 * scale.item())
    assert codes.float().abs().amax(1).tolist() == [448.0] * 3 + [0.0] + [448.0] * 5


@every_dtype
@pytest.mark.parametrize("rows", [1, 37])
def test_products_are_those_of_the_rounded_factors(dtype, rows):
    W = QuantisedWeight(torch.randn(48, 128) * torch.rand(48, 1), KIND)
    x, dy = torch.randn(rows, 128).to(dtype), torch.randn(rows, 48).to(dtype)
    dense, scales = W.dense(torch.float32).double(), W.scales.view(torch.float32)
    torch.testing.assert_close(exact(W.codes.view(48, 128), scales), dense)
    y = fp8_product(x, W.codes, W.scales)
    assert y.dtype == dtype
    assert relative_error(y, exact(*rounded_rows(x)) @ dense.T) < DTYPES[dtype]
    dx = fp8_product_back(dy, W.codes, W.scales)
    rounded = exact(*rounded_rows(dy, scales))
    expected = rounded @ exact(W.codes.view(48, 128), torch.ones(48))
    assert relative_error(dx, expected) < DTYPES[dtype]
    assert relative_error(dx, dy.double() @ dense) < 0.04
    s, D = torch.randn(rows, 4).to(dtype), torch.randn(4, 48).to(dtype)
    plus = fp8_product(x, W.codes, W.scales, s, D)
    assert relative_error(plus, y.double() + s.double() @ D.double()) < 2 * DTYPES[dtype]
    tiled = fp8_product(x, W.codes, W.scales, s)
    assert relative_error(tiled, y.double() + s.double().repeat(1, 12)) < 2 * DTYPES[dtype]


def test_operators_say_what_they_return():
    W = QuantisedWeight(torch.randn(32, 64), KIND)
    x, dy = torch.randn(5, 64), torch.randn(5, 32)
    checks = "test_schema", "test_faketensor"
    ops = torch.ops.finchtune
    inputs = x, W.codes, W.scales, torch.randn(5, 4), torch.randn(4, 32)
    torch.library.opcheck(ops.fp8_product, inputs, test_utils=checks)
    torch.library.opcheck(ops.fp8_product_back, (dy, W.codes, W.scales), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "settings"), METHOD_CASES)
def test_adapters_differ_from_the_dense_weight_by_the_rounding_of_activations(
    name, settings, dtype, monkeypatch
):
    """And never rebuild it."""
    layer, dense = quantised_and_dense(name, settings, KIND, (128, 48), 1 / 16, dtype)
    x = torch.randn(2, 30, 128, dtype=dtype, requires_grad=True)
    inputs = [x, *layer.adapter.parameters()]
    expected = dense(x)
    dy = torch.randn_like(expected)
    truth = [expected, *torch.autograd.grad(expected, inputs, dy)]
    monkeypatch.delattr("finchtune.adapters.frozen.dequantise")
    y = layer(x)
    found = [y, *torch.autograd.grad(y, inputs, dy)]
    errors = [relative_error(mine, true) for mine, true in zip(found, truth, strict=True)]
    assert max(errors) < 0.045, errors
    assert min(errors[:2]) > 0.005  # they were rounded at all


@pytest.mark.parametrize("name", ["dora", "lora_ga"])
def test_methods_that_need_the_weight_itself_are_refused(name):
    model = nn.Sequential(nn.Linear(64, 64))
    settings = {"init": False} if name == "lora_ga" else {}
    with pytest.raises(UserError, match=f"{name} needs the weights themselves"):
        attach(model, name, quant=KIND, r=2, **settings)


def test_layers_and_devices_without_such_products_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"layer 0: .*multiple of 16.*one is 64 x 40"):
        attach(nn.Sequential(nn.Linear(40, 64)), "bone", r=8, quant=KIND)
    monkeypatch.setattr(fp8, "can_multiply", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UserError, match=r"A100 has no products in fp8.*give `quant` fp8"):
        attach(nn.Sequential(nn.Linear(64, 64)), "bone", r=8, quant=KIND)


def wide_model(grad_cp=0):
    model = small_model(n_embd=128, dim_ffn=448)
    model.grad_checkpoint = grad_cp
    return attach(model, "bone", r=8, quant=KIND)


def test_recomputing_changes_no_gradient():
    tokens = torch.randint(256, (2, 20))
    found = []
    for grad_cp in (0, 1, 2):
        model = wide_model(grad_cp)
        own = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in own:
                p.copy_(torch.linspace(-0.05, 0.05, p.numel()).view_as(p))
        loss, _ = model.loss(tokens, tokens)
        found.append([loss, *torch.autograd.grad(loss, own)])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@torch.no_grad()
def test_writing_and_merging_use_the_weight_that_training_saw(kernels):
    """Both without rounding activations, as the merged model."""
    model, tokens = wide_model().eval(), torch.randint(256, (2, 9))
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            nn.init.normal_(parameter, std=0.1)
    form = model.inference_form()
    written = form.logits(form.advance(tokens)[0])
    rounded = model(tokens)[0][:, -1]
    merge(model)
    expected = model(tokens)[0][:, -1]
    assert relative_error(written, expected) < 1e-5
    assert 1e-3 < relative_error(rounded, expected) < 0.2
