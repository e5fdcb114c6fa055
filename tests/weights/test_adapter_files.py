"""Adapter files of RWKV-PEFT: continuing from them, and merging them."""

import pytest
import torch
from helpers.support import (
    assert_one_error_line,
    metrics,
    relative_error,
    run_script,
    rwkv_package_logits,
    save_model,
    small_model,
    train,
)

from finchtune.adapters import attach
from finchtune.config import TrainConfig
from finchtune.config.checks import validate
from finchtune.errors import UserError
from finchtune.files import sha256
from finchtune.training.setup import build_model
from finchtune.weights.adapter_files import adapter_keys, save_adapter
from finchtune.weights.base import load_model
from finchtune.weights.merging import merge_files
from finchtune.weights.tensors import write_tensors

R, ALPHA = 8, 12
LINEARS = [f"att.{n}" for n in ("receptance", "key", "value", "gate", "output")]
LINEARS += [f"ffn.{n}" for n in ("key", "receptance", "value")]
FORMS = {
    "bone, 2025": ("bone", ".disha", {"bone_r": R}),
    "bone, 2024": ("bone", ".bone", {"bone_r": R}),
    "bat, 2025": ("bat", ".disha", {"bat_r": R}),
    "bat, 2024": ("bat", ".bone", {"bat_r": R}),
    "lora": ("lora", "", {"lora_r": R, "lora_alpha": ALPHA}),
    "pissa": ("pissa", "", {"pissa_r": R}),
}


def noise(*shape):
    return 0.05 * torch.randn(*shape)


def incumbent_tensors(method, suffix, weights):
    """What RWKV-PEFT saves, in fp32, and the content of its init_pissa.pth.

    Bone is (r, out), Bat (in / r, r, r), LoRA (r, in) and (out, r); keys have no prefix, but in
    init_pissa.pth they are those of the wrapped model.
    """
    saved, initial = {}, {}
    for name in (f"blocks.{i}.{linear}" for i in range(2) for linear in LINEARS):
        d, k = weights[f"{name}.weight"].shape
        if method == "bone":
            saved[name + suffix] = noise(R, d)
        elif method == "bat":
            saved[name + suffix] = noise(k // R, R, R)
        else:
            saved[f"{name}.lora_A"], saved[f"{name}.lora_B"] = noise(R, k), noise(d, R)
        if method == "pissa":
            initial[f"model.{name}.init_lora_A"] = noise(R, k)
            initial[f"model.{name}.init_lora_B"] = noise(d, R)
    return saved, initial


def incumbent_weights(saved, initial, weights):
    """The weights with which RWKV-PEFT's layers compute, written out from its forward passes."""
    merged = {key: saved.get(key, tensor) for key, tensor in weights.items()}
    for key, D in saved.items():
        name, _, kind = key.rpartition(".")
        W = weights.get(f"{name}.weight")
        if kind in ("bone", "disha"):
            change = torch.zeros_like(W)
            for o in range(0, W.shape[0], R):
                for b, i in enumerate(range(0, W.shape[1], R)):
                    block = W[o : o + R, i : i + R]
                    change[o : o + R, i : i + R] = (
                        D[:, o : o + R].T if D.dim() == 2 else block @ D[b] + D[b]
                    )
            merged[f"{name}.weight"] = W + change
        elif kind == "lora_A" and initial:
            first = initial[f"model.{name}.init_lora_B"] @ initial[f"model.{name}.init_lora_A"]
            merged[f"{name}.weight"] = W - first + saved[f"{name}.lora_B"] @ D
        elif kind == "lora_A":
            merged[f"{name}.weight"] = W + ALPHA / R * saved[f"{name}.lora_B"] @ D
    return merged


@pytest.fixture
def base(tmp_path):
    return save_model(small_model(), tmp_path / "base.pth")


def write_incumbent(base, method, suffix, extra=()):
    """An adapter file beside `base`: its path, flags for its PiSSA file, and the weights it means.

    `extra` are words of --train_parts: parameters with one in their name are in the file too.
    """
    weights = torch.load(base)
    saved, initial = incumbent_tensors(method, suffix, weights)
    parts = [name for name in weights if any(word in name for word in extra)]
    saved |= {name: weights[name] + noise(*weights[name].shape) for name in parts}
    path = base.with_name("rwkv-0.pth")
    write_tensors(saved, path)
    flags = {}
    if initial:
        write_tensors(initial, base.with_name("init_pissa.pth"))
        flags["pissa_init"] = str(base.with_name("init_pissa.pth"))
    return path, flags, incumbent_weights(saved, initial, weights)


def model_from(base, path, method, **flags):
    config = TrainConfig(
        load_model=str(base), data_file="unused", peft=method, peft_load=str(path), **flags
    )
    validate(config)
    return build_model(config, torch.float32, torch.device("cpu"))


def logits_with(base, weights, tokens):
    model = load_model(base)
    model.load_state_dict(weights)
    return model(tokens)[0]


@pytest.mark.parametrize("form", FORMS)
def test_training_goes_on_from_what_the_file_means(base, form):
    method, suffix, flags = FORMS[form]
    path, initial, weights = write_incumbent(base, method, suffix)
    model = model_from(base, path, method, **flags, **initial)
    tokens = torch.randint(1, 256, (1, 24))
    found = model(tokens)[0]
    expected = logits_with(base, weights, tokens)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(load_model(base)(tokens)[0], expected) > 1e-2
    found.square().mean().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(model.get_parameter(name).grad.any() for name in trained)


@pytest.mark.parametrize("form", FORMS)
def test_merging_gives_what_the_file_means(base, form):
    method, suffix, _ = FORMS[form]
    path, initial, weights = write_incumbent(base, method, suffix, extra=("time", "ln"))
    stated = {"alpha": ALPHA, "rslora": False} if method == "lora" else {}
    stated |= {"mode": "row"} if method == "bat" else {}
    counts = merge_files(
        *(base, path, base.with_name("merged.pth")),
        stated={"quant": "none", **stated},
        initial=initial.get("pissa_init"),
    )
    merged = torch.load(base.with_name("merged.pth"))
    assert list(merged) == list(torch.load(base))
    for name, expected in weights.items():
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    assert counts["merged"] == 16
    assert counts["replaced"] == sum("time" in name or "ln" in name for name in weights)


def test_a_weight_under_bat_cannot_be_trained(base):
    flags = {"bat_r": 8, "peft": "bat", "load_model": str(base), "train_parts": ["ln", "att.key"]}
    with pytest.raises(UserError, match=r"att\.key: blocks\.0\.att\.key has an adapter of bat, be"):
        build_model(TrainConfig(**flags), torch.float32, torch.device("cpu"))


def test_other_trained_parameters_need_train_parts(base):
    path, _, weights = write_incumbent(base, "bone", ".bone", extra=("time", "ln"))
    with pytest.raises(UserError, match=r"holds .* trained tensors .* give `train_parts` time ln"):
        model_from(base, path, "bone", bone_r=R)
    with pytest.raises(UserError, match="give `train_parts` time to continue"):
        model_from(base, path, "bone", bone_r=R, train_parts=["ln"])
    with pytest.raises(UserError, match=r"does not hold head.weight .* drop what the file lacks"):
        model_from(base, path, "bone", bone_r=R, train_parts=["ln", "time", "head"])
    model = model_from(base, path, "bone", bone_r=R, train_parts=["time", "ln"])
    found = model.state_dict()
    names = [name for name in weights if "time" in name or "ln" in name]
    assert len(names) > 20
    for name in names:
        assert torch.equal(found[name], weights[name]), name
        assert model.get_parameter(name).requires_grad


def test_states_need_train_type_state(base):
    path = write_incumbent(base, "bone", ".bone")[0]
    states = {f"blocks.{i}.att.time_state": torch.randn(8, 8, 8) for i in range(2)}
    both, alone = base.with_name("both.pth"), base.with_name("states.pth")
    write_tensors(torch.load(path) | states, both)
    write_tensors(states, alone)
    with pytest.raises(UserError, match="holds 2 trained states; give `train_type` state"):
        model_from(base, both, "bone", bone_r=R)
    with pytest.raises(UserError, match="holds no trained states; drop `train_type` state"):
        model_from(base, path, "bone", bone_r=R, train_type=["state"])
    with pytest.raises(UserError, match="an adapter of bone; give `peft` bone, and `train_type`"):
        model_from(base, both, "state")
    for file, flags in ((both, {"method": "bone", "bone_r": R}), (alone, {"method": "none"})):
        found = model_from(base, file, train_type=["state"], **flags).initial_states()
        assert found.keys() == states.keys()
        assert all(torch.equal(found[name], states[name]) for name in states)


@pytest.mark.parametrize(
    ("form", "method", "flags", "message"),
    [
        ("bone, 2025", "bone", {"bone_r": 16}, "give `peft` bone `bone_r` 8"),
        ("bone, 2025", "bat", {"bat_r": R}, "give `peft` bone `bone_r` 8"),
        ("bat, 2024", "bone", {"bone_r": R}, "give `peft` bat `bat_r` 8 `bat_mode` row"),
        ("bat, 2024", "bat", {"bat_r": R, "bat_mode": "col"}, "`bat_mode` row"),
        ("lora", "lora", {"lora_r": 4}, "give `peft` lora `lora_r` 8"),
        ("lora", "pissa", {"pissa_r": R}, "no initial A and B.* as `pissa_init`"),
    ],
)
def test_flags_that_do_not_fit_the_file_are_refused_with_those_that_do(
    base, form, method, flags, message
):
    path, _, _ = write_incumbent(base, *FORMS[form][:2])
    with pytest.raises(UserError, match=message):
        model_from(base, path, method, **flags)


def test_files_without_adapters_are_not_started_from(base):
    with pytest.raises(UserError, match="holds no adapter; give merged weights as `load_model`"):
        model_from(base, base, "bone")


def test_our_own_files_are_checked_against_their_record(base, tmp_path):
    settings = {"r": R, "alpha": ALPHA, "dropout": 0.1}
    model = attach(load_model(base), "lora", **settings)
    path = tmp_path / "own" / "rwkv-3.pth"
    record = {"adapter": model.adapter_spec, "base": {"file": "base", "sha256": sha256(base)}}
    tensors = {key: model.state_dict()[name] for name, key in adapter_keys(model).items()}
    save_adapter(tensors, record, path)
    with pytest.raises(UserError, match="give `peft` lora `lora_r` 8 `lora_alpha` 12"):
        model_from(base, path, "lora", lora_r=R)
    again = model_from(base, path, "lora", lora_r=R, lora_alpha=ALPHA, lora_dropout=0.0)
    assert torch.equal(
        again.blocks[0].att.key.adapter.lora_A, model.blocks[0].att.key.adapter.lora_A
    )
    other = save_model(small_model(seed=5), tmp_path / "other.pth")
    with pytest.raises(UserError, match="is not the base of"):
        model_from(other, path, "lora", lora_r=R, lora_alpha=ALPHA)


@pytest.mark.slow
def test_a_run_goes_on_from_such_a_file(base, tmp_path):
    path, _, weights = write_incumbent(base, "bone", ".disha", extra=("ln",))
    (tmp_path / "text.jsonl").write_text('{"text": "one two three four"}\n' * 8)
    flags = [
        *("--load_model", base, "--data_file", tmp_path / "text.jsonl", "--data_type", "jsonl"),
        *("--ctx_len", 16, "--micro_bsz", 2, "--epoch_steps", 2, "--proj_dir", tmp_path / "out"),
        *("--train_parts", '["ln"]'),
    ]
    config = f'{{"mode": "bone", "load": "{path}", "r": {R}}}'
    wrong = run_script("train.py", *flags, "--peft", "disha", "--disha_config",
                       config.replace(f'"r": {R}', '"r": 16'))  # fmt: skip
    assert_one_error_line(wrong, "give --peft bone --bone_r 8")
    train(*flags, "--peft", "disha", "--disha_config", config)
    tokens = torch.tensor([list(b"\0one two three fou")])
    labels = tokens.roll(-1)[:, :-1]
    model = load_model(base)
    model.load_state_dict(weights)
    first = metrics(tmp_path / "out")[0]["loss"]
    assert first == pytest.approx(model.loss(tokens[:, :-1], labels)[0].item() / 16, rel=0.05)
    merge_files(base, tmp_path / "out" / "rwkv-0.pth", tmp_path / "merged.pth")
    assert rwkv_package_logits(tmp_path / "merged.pth", [1, 2, 3]).isfinite().all()
