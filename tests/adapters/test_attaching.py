"""Putting adapters on models, taking them off, and their files' keys."""

import copy
import json

import pytest
import torch
from helpers.adapter_models import TOKENS, Classifier, Finchlike, finchlike, move
from torch import nn

from finchtune.adapters import (
    METHODS,
    AdaptedLinear,
    adapter_state,
    attach,
    collected_gradients,
    file_key,
    load_adapter_state,
    merge,
    start_from_gradients,
    weight_gradients,
)
from finchtune.errors import UserError


@pytest.mark.parametrize(
    ("L", "C", "F", "method", "settings", "millions"),
    [
        (32, 4096, 14336, "bone", {}, 88.08),
        (32, 4096, 14336, "lora", {}, 88.08),
        (32, 4096, 14336, "pissa", {}, 88.08),
        (32, 2560, 8960, "bone", {}, 55.05),
        (32, 2560, 8960, "lora", {}, 55.05),
        (32, 2560, 8960, "bat", {"mode": "row"}, 55.05),
        (32, 2560, 8960, "bat", {"mode": "col"}, 55.05),
    ],
)
def test_the_papers_parameter_counts(L, C, F, method, settings, millions):
    with torch.device("meta"):
        model = attach(Finchlike(L, C, F), method, init=False, **settings)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trainable / 1e6, 2) == millions


def test_an_rwkv_gets_adapters_on_the_8_linears_of_each_block():
    model = attach(finchlike(), "bone", r=4)
    adapted = [name for name, m in model.named_modules() if isinstance(m, AdaptedLinear)]
    att = [f"att.{n}" for n in ("receptance", "key", "value", "gate", "output")]
    ffn = [f"ffn.{n}" for n in ("key", "receptance", "value")]
    assert adapted == [f"blocks.{i}.{name}" for i in range(2) for name in att + ffn]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.adapter.bone" for name in adapted}


def test_another_model_gets_them_on_all_but_the_output_layer():
    model = attach(Classifier(), "lora", r=2)
    assert type(model.classifier) is nn.Linear
    assert isinstance(model.up, AdaptedLinear)
    assert model.again is model.down
    assert isinstance(model.again, AdaptedLinear)


def test_targets_match_the_full_name():
    model = attach(finchlike(), "bone", r=4, targets=r"blocks\.1\.att\.(key|extra)")
    assert list(adapter_state(model)) == ["blocks.1.att.key.bone", "blocks.1.att.extra.bone"]


@pytest.mark.parametrize("method", METHODS)
def test_attach_train_merge(method):
    model = Classifier().double()
    x = torch.randn(4, 8, dtype=torch.float64)
    before, base = model(x), copy.deepcopy(model.state_dict())
    gradients = None
    if method == "lora_ga":
        gradients = weight_gradients(model, lambda: model(x).square().sum())
    settings = {"r1": 4, "r2": 4} if method == "disha" else {"r": 4}
    attach(model, method, gradients=gradients, **({} if method == "frozen_ft" else settings))
    torch.testing.assert_close(model(x), before)
    state = model.state_dict()
    assert all(torch.equal(state[key], base[key]) for key in base)
    move(model)
    trained = model(x)
    assert not torch.allclose(trained, before)
    merge(model)
    assert type(model.up) is nn.Linear
    assert model.again is model.down
    assert model.state_dict().keys() == base.keys()
    assert not hasattr(model, "adapter_spec")
    torch.testing.assert_close(model(x), trained)


def test_spec_and_state_rebuild_the_model():
    model = attach(finchlike(), "lora", r=2, alpha=5, rslora=True, targets=r"blocks\.0\..*key")
    move(model)
    spec = json.loads(json.dumps(model.adapter_spec))
    assert spec == model.adapter_spec
    assert spec["dropout"] == 0.0
    other = finchlike()
    base = model.state_dict()
    other.load_state_dict({key: base[key] for key in other.state_dict()})
    attach(other, init=False, **spec)
    load_adapter_state(other, adapter_state(model))
    assert other.adapter_spec == spec
    assert torch.equal(other(TOKENS), model(TOKENS))
    merge(other)
    attach(other, **spec)
    assert other.adapter_spec == spec


def test_state_has_the_keys_of_other_software():
    model = attach(finchlike(), "pissa", r=2)
    keys = [k for k in adapter_state(model) if k.startswith("blocks.0.att.key.")]
    names = ["lora_A", "lora_B", "init_lora_A", "init_lora_B"]
    assert keys == [f"blocks.0.att.key.{name}" for name in names]
    assert keys == [file_key(f"blocks.0.att.key.adapter.{name}") for name in names]
    assert file_key("blocks.0.att.time_decay") == "blocks.0.att.time_decay"


def test_state_is_live_and_detached():
    model = attach(finchlike(), "bone", r=4)
    state = adapter_state(model)
    move(model)
    assert state["blocks.0.att.key.bone"].any()
    assert not state["blocks.0.att.key.bone"].requires_grad


def test_loading_lists_every_misfit_and_changes_nothing():
    model = attach(finchlike(), "bone", r=4)
    state = {k: torch.ones_like(v) for k, v in adapter_state(model).items()}
    state["blocks.9.att.key.bone"] = state.pop("blocks.0.att.key.bone")
    state["blocks.0.att.value.bone"] = torch.ones(3, 8)
    with pytest.raises(UserError) as caught:
        load_adapter_state(model, state)
    message = str(caught.value)
    assert "missing blocks.0.att.key.bone" in message
    assert "unknown blocks.9.att.key.bone" in message
    assert "blocks.0.att.value.bone has shape (3, 8), expected (4, 8)" in message
    assert not any(tensor.any() for tensor in adapter_state(model).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "bones"},
            "no adapter method 'bones'; did you mean 'bone'?.*known: bat, biglora, bone",
        ),
        (
            {"method": "lora", "alhpa": 2},
            "no hyperparameter 'alhpa'; did you mean 'alpha'?.*known: r",
        ),
        ({"method": "bat", "r": 5}, r"layer blocks\.0\.att\.receptance.*r = 5.*in_features = 8"),
        ({"method": "bat", "mode": "diagonal"}, "modes .*'diagonal'"),
        ({"method": "bone", "r": 0}, "r must be a whole number above 0, not 0"),
        ({"method": "bone", "r": 2.5}, "r must be a whole number above 0, not 2.5"),
        ({"method": "bone", "r": True}, "r must be a whole number above 0, not True"),
        ({"method": "lora", "alpha": 0}, "alpha must be a number above 0"),
        ({"method": "lora", "dropout": 1}, "dropout must be at least 0 and below 1"),
        ({"method": "pissa", "r": 9}, "r = 9 is larger than the smaller side"),
        ({"method": "pissa", "r": 2, "svd_niter": -1}, "svd_niter"),
        ({"method": "lora_ga", "r": 5}, "2 r = 10"),
        ({"method": "lora_ga", "r": 2}, r"layer blocks\.0\.att\.receptance.*gradients"),
        ({"method": "lora_ga", "r": 2, "gradients": {}}, "no gradient of shape"),
        ({"method": "bone", "r": 2, "gradients": {}}, "no gradient of shape"),
        ({"method": "bone", "targets": "blocks"}, "'blocks' matches no linear layer.*has 19"),
        ({"method": "bone", "targets": "("}, "not a regular expression"),
    ],
)
def test_mistakes_are_told_and_change_nothing(arguments, message):
    model = finchlike()
    keys = list(model.state_dict())
    with pytest.raises(UserError, match=message):
        attach(model, **arguments)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "adapter_spec")


def test_a_model_is_adapted_once():
    model = attach(finchlike(), "bone", r=4)
    with pytest.raises(UserError, match="already has adapters"):
        attach(model, "lora", r=2)
    with pytest.raises(UserError, match="no adapters"):
        merge(finchlike())
    with pytest.raises(UserError, match="no adapters"):
        adapter_state(finchlike())


def test_gradients_for_a_method_that_takes_none():
    model = Classifier()
    gradients = weight_gradients(model, lambda: model(torch.randn(2, 8)).sum())
    with pytest.raises(UserError, match="bone does not start from gradients"):
        attach(model, "bone", r=4, gradients=gradients)


def test_a_fused_encoder_layer_would_skip_adapters():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer).eval()
    x = torch.randn(2, 3, 8)
    with pytest.raises(UserError, match="set_fastpath_enabled"):
        attach(model, "bone", r=4)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        attach(model, "bone", r=4)
        before = model(x)
        move(model)
        assert not torch.equal(model(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merging_refuses_what_is_not_finite(value):
    model = attach(finchlike(), "bone", r=4)
    with torch.no_grad():
        model.blocks[1].ffn.value.adapter.bone[0, 0] = value
    with pytest.raises(UserError, match=r"layer blocks\.1\.ffn\.value.*NaN or infinity"):
        merge(model)
    assert isinstance(model.blocks[0].att.key, AdaptedLinear)


def test_merging_rounds_once():
    model = attach(finchlike().bfloat16(), "lora", r=4)
    move(model)
    layer = model.blocks[0].att.key
    assert layer.adapter.lora_A.dtype == torch.float32
    exact = layer.adapter.double().merged(layer.weight.double())
    layer.adapter.float()
    merge(model)
    merged = model.blocks[0].att.key.weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())


def test_mode_and_bias_are_kept():
    model = Classifier().eval()
    bias = model.up.bias
    attach(model, "lora", r=2, dropout=0.5)
    assert model.up.bias is bias
    assert not any(module.training for module in model.modules())
    assert not any(module.training for module in merge(model).modules())


def test_weight_gradients_leave_the_model_as_it_was():
    model = Classifier()
    model.classifier.weight.requires_grad_(False)
    x = torch.randn(4, 8)
    model(x).square().sum().backward()
    expected = {name: getattr(model, name).weight.grad for name in ("up", "down")}
    gradients = weight_gradients(model, lambda: model(x).square().sum())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
        assert getattr(model, name).weight.grad is expected[name]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["classifier.weight"]


def test_adapters_start_from_the_gradients_of_several_batches():
    model = finchlike()
    batches = [TOKENS, TOKENS.flip(0), TOKENS + 1]
    together = weight_gradients(model, lambda: sum(model(t).square().sum() for t in batches))
    attach(model, "lora_ga", r=2, init=False)
    with collected_gradients(model) as gradients:
        for batch in batches:
            model(batch).square().sum().backward()
    start_from_gradients(model, gradients)
    other = finchlike()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter" not in k})
    attach(other, "lora_ga", r=2, gradients=together)
    for key, tensor in adapter_state(model).items():
        found, expected = (s[key] for s in (adapter_state(model), adapter_state(other)))
        # A singular vector's sign is free.
        torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-3, atol=1e-4)
        assert tensor.any()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapter." in name for name in trainable)
    assert len(trainable) == 32


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("bone", {"r": 9}),
        ("disha", {"r1": 13}),
        ("disha", {"r1": 12, "r2": 9}),
        ("lora", {"r": 1025}),
        ("dora", {"r": 1025}),
    ],
)
def test_sizes_that_no_layer_has_use_for_are_refused(method, settings):
    model = nn.Sequential(nn.Linear(8, 12))
    with pytest.raises(UserError, match=r"layer 0: r\d? = [\d,]+ is above"):
        attach(model, method, **settings)
