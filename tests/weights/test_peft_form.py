"""Hugging Face's peft as the independent reference: same numbers, and files both ways."""

import copy

import pytest
import torch
from helpers.support import small_model
from torch import nn

from finchtune.adapters import adapter_state, attach, load_adapter_state
from finchtune.errors import UserError
from finchtune.files import read_json, write_json
from finchtune.models.rwkv6.layouts import from_hf, to_hf
from finchtune.weights.peft_form import (
    PeftAdapter,
    read_peft,
    with_whole_magnitudes,
    write_peft,
)

IN, HIDDEN, OUT, R = 12, 24, 8, 4
LORA = {"r": R, "lora_alpha": 6}
# Our method and settings -> peft's configuration class and settings.
SAME = {
    "bone": ("bone", {"r": R}, "MissConfig", {"r": R}),
    "bone, r does not divide": ("bone", {"r": 5}, "MissConfig", {"r": 5}),
    "bat col": ("bat", {"r": R, "mode": "col"}, "MissConfig", {"r": R, "init_weights": "bat"}),
    "disha": ("disha", {"r1": 2, "r2": 3}, "MissConfig",
              {"r": 3, "mini_r": 2, "init_weights": "mini"}),
    "lora": ("lora", {"r": R, "alpha": 6}, "LoraConfig", LORA),
    "rslora": ("lora", {"r": R, "alpha": 6, "rslora": True}, "LoraConfig",
               LORA | {"use_rslora": True}),
    "dora": ("dora", {"r": R, "alpha": 6}, "LoraConfig", LORA | {"use_dora": True}),
}  # fmt: skip
RESIDUAL = {
    "pissa": ("pissa", {"r": R, "svd_niter": 0}, {"r": R, "lora_alpha": R}),
    "olora": ("olora", {"r": R, "alpha": 6}, LORA),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(IN, HIDDEN)
        self.down = nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, x):
        return self.down(self.up(x).tanh())


def peft_model(net: nn.Module, kind: str, settings: dict) -> nn.Module:
    """A copy of `net` under peft, in float64."""
    import peft  # slow to import

    config = getattr(peft, kind)(**settings, target_modules=["up", "down"])
    return peft.get_peft_model(copy.deepcopy(net), config).double()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def shake(model: nn.Module) -> None:
    """Train, in effect: change every trainable parameter."""
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.3 * torch.randn_like(parameter))


def state_of(model: nn.Module) -> PeftAdapter:
    state = {key: tensor.detach() for key, tensor in adapter_state(model).items()}
    return PeftAdapter(state, model.adapter_spec)


def run(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the input; leaves the parameters' gradients behind."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), x.grad


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    for got, want in zip(run(ours, x), run(theirs, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def gradient_of(model: nn.Module, key: str) -> torch.Tensor:
    layer, _, own = key.rpartition(".")
    own = "magnitude_change" if own == "init_magnitude" else own  # the sum's gradient is both's
    return getattr(model.get_submodule(layer).adapter, own).grad


def compare(name: str, folder) -> None:
    method, settings, kind, theirs = SAME[name]
    net = Net().double()
    reference = peft_model(net, kind, theirs)
    shake(reference)
    reference.save_pretrained(folder)
    read = read_peft(folder)
    ours = attach(copy.deepcopy(net), method, **settings)
    assert {key: read.spec[key] for key in settings} == settings
    load_adapter_state(ours, read.tensors)
    assert len(trained(ours)) == len(trained(reference))
    assert_same(ours, reference)
    for parameter in trained(reference):
        parameter.data.copy_(parameter.grad)
    reference.save_pretrained(folder)
    for key, expected in read_peft(folder).tensors.items():
        if key.endswith("magnitude_change"):
            continue
        torch.testing.assert_close(gradient_of(ours, key), expected, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(ours(torch.ones(IN).double()), net(torch.ones(IN).double()))


def test_bone_bat_and_lora_compute_what_peft_does(tmp_path):
    for name in ("bone", "bat col", "lora"):
        compare(name, tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_the_same_numbers_as_peft(name, tmp_path):
    compare(name, tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("name", RESIDUAL)
def test_methods_that_change_the_base_start_and_compute_as_in_peft(name):
    method, settings, theirs = RESIDUAL[name]
    net = Net()
    reference = peft_model(net, "LoraConfig", theirs | {"init_lora_weights": name})
    ours = attach(copy.deepcopy(net), method, **settings).double()
    scale = settings.get("alpha", R) / R
    for layer in ("up", "down"):
        adapter, peft_layer = ours.get_submodule(layer).adapter, reference.get_submodule(
            f"base_model.model.{layer}"
        )  # fmt: skip
        A, B = peft_layer.lora_A.default.weight, peft_layer.lora_B.default.weight
        # peft starts in float32 alone.
        torch.testing.assert_close(
            adapter.lora_B @ adapter.lora_A, B @ A, rtol=1e-4, atol=1e-5, check_dtype=False
        )
        adapter.start_at(A, B)
        ours.get_submodule(layer).weight.data = peft_layer.base_layer.weight + scale * B @ A
    torch.manual_seed(1)
    shake(reference)
    for layer in ("up", "down"):
        adapter, peft_layer = ours.get_submodule(layer).adapter, reference.get_submodule(
            f"base_model.model.{layer}"
        )  # fmt: skip
        adapter.lora_A.data = peft_layer.lora_A.default.weight.data.clone()
        adapter.lora_B.data = peft_layer.lora_B.default.weight.data.clone()
    assert_same(ours, reference)
    for layer in ("up", "down"):
        peft_layer = reference.get_submodule(f"base_model.model.{layer}")
        for own in ("lora_A", "lora_B"):
            expected = getattr(peft_layer, own).default.weight.grad
            torch.testing.assert_close(gradient_of(ours, f"{layer}.{own}"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SAME, *RESIDUAL])
def test_peft_loads_what_we_write(name, tmp_path):
    import peft

    method, settings = (SAME | RESIDUAL)[name][:2]
    net = Net()
    ours = attach(copy.deepcopy(net), method, **settings)
    shake(ours)
    write_peft(state_of(ours), tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "peft")
    x = torch.randn(3, 5, IN)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x), ours(x), rtol=1e-2)


@pytest.mark.parametrize("name", SAME)
def test_there_and_back_gives_the_same_bits(name, tmp_path):
    method, settings = SAME[name][:2]
    ours = attach(Net(), method, **settings)
    shake(ours)
    before = state_of(ours)
    write_peft(before, tmp_path / "peft")
    after = read_peft(tmp_path / "peft")
    assert before.tensors.keys() == after.tensors.keys()
    if method == "dora":  # peft has a magnitude, not its start and its change
        before, after = with_whole_magnitudes(before), with_whole_magnitudes(after)
    assert all(torch.equal(before.tensors[key], after.tensors[key]) for key in before.tensors)
    assert {"targets": before.spec["targets"]} | after.spec == before.spec


@pytest.mark.parametrize("name", ["bat", "frozen_ft", "biglora"])
def test_methods_unknown_to_peft_are_not_written(name, tmp_path):
    settings = {} if name == "frozen_ft" else {"r": R}
    ours = attach(Net(), name, **settings)
    with pytest.raises(UserError, match=f"peft has no form for {name}.* merge the adapter"):
        write_peft(state_of(ours), tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def test_trained_parts_of_the_model_are_not_lost(tmp_path):
    adapter = state_of(attach(Net(), "bone", r=R))
    adapter.tensors["ln_out.weight"] = torch.ones(3)
    with pytest.raises(UserError, match=r"ln_out.weight is a trained tensor of the model itself"):
        write_peft(adapter, tmp_path / "peft")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "VERA"}, "peft_type VERA is not known here"),
        ({"rank_pattern": {"up": 2}}, "rank_pattern .* is not available"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True is not available"),
        ({"bias": "all"}, "bias 'all' is not available"),
        ({"init_lora_weights": "pissa_niter_4"}, "started by pissa_niter_4 stands on changed base"),
        ({"use_dora": True, "lora_dropout": 0.1}, "dora with use_rslora or lora_dropout"),
    ],
)
def test_settings_whose_effect_would_be_lost_are_refused(change, message, tmp_path):
    write_peft(state_of(attach(Net(), "lora", r=R)), tmp_path / "peft")
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    write_json(tmp_path / "peft" / "adapter_config.json", config | change)
    with pytest.raises(UserError, match=message):
        read_peft(tmp_path / "peft")


def test_tensors_that_belong_to_no_adapter_and_broken_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    write_peft(state_of(attach(Net(), "lora", r=R)), tmp_path / "peft")
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({"base_model.model.head.weight": torch.ones(2)}, weights)
    with pytest.raises(UserError, match=r"head.weight is no tensor of a lora adapter"):
        read_peft(tmp_path / "peft")
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be read"):
        read_peft(tmp_path / "peft")
    weights.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_peft(tmp_path / "peft")


def test_names_of_hugging_faces_rwkv6():
    names = {
        "blocks.3.att.key": "rwkv.blocks.3.attention.key",
        "blocks.11.ffn.receptance.weight": "rwkv.blocks.11.feed_forward.receptance.weight",
        "blocks.0.ln0.bias": "rwkv.blocks.0.pre_ln.bias",
        "blocks.0.att.ln_x.weight": "rwkv.blocks.0.attention.ln_x.weight",
        "emb.weight": "rwkv.embeddings.weight",
        "ln_out.weight": "rwkv.ln_out.weight",
        "head.weight": "head.weight",
    }
    assert {name: to_hf(name) for name in names} == names
    assert [from_hf(name) for name in names.values()] == list(names)
    everything = list(small_model().state_dict())
    assert len({to_hf(name) for name in everything}) == len(everything)
    assert [from_hf(to_hf(name)) for name in everything] == everything
    with pytest.raises(UserError, match="no name of Hugging Face's RWKV-6 layout"):
        from_hf("blocks.0.att.key")
