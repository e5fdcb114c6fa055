"""The model against the independent `rwkv` package, its own other forms, and its formulas."""

import pytest
import torch
from support import relative_error, rwkv_package_logits, save_model, small_model

import finchtune
from finchtune.errors import UserError
from finchtune.model import RWKV6, ModelConfig, init_weights

SHAPES = {
    "head size 8": {"n_layer": 2, "n_embd": 64, "head_size": 8},
    "head size 64": {"n_layer": 2, "n_embd": 128, "head_size": 64},
    "odd layers, own F": {"n_layer": 3, "n_embd": 64, "head_size": 16, "dim_ffn": 200},
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_logits_equal_the_rwkv_package(tmp_path, sizes):
    path = save_model(small_model(**sizes), tmp_path / "model.pth")
    tokens = torch.randint(1, 256, (1, 45))
    logits, _ = finchtune.load_model(path)(tokens)
    expected = rwkv_package_logits(path, tokens[0].tolist())
    assert relative_error(logits[0], expected) < 1e-4


def test_logits_of_a_trained_model_equal_the_rwkv_package(tiny6):
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps."
    tokens = torch.tensor([list(text.encode("utf-16-le"))])
    logits, _ = finchtune.load_model(tiny6)(tokens)
    expected = rwkv_package_logits(tiny6, tokens[0].tolist())
    assert relative_error(logits[0], expected) < 1e-4
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()
    assert loss < 2.0, "a trained model predicts text of its own kind"


def test_recurrent_form_equals_parallel_form():
    model = small_model().double()
    tokens = torch.randint(0, 256, (2, 20))
    whole, end = model(tokens)
    state, parts = None, []
    for length in (1, 1, 7, 1, 10):
        done = sum(part.shape[1] for part in parts)
        logits, state = model(tokens[:, done : done + length], state)
        parts.append(logits)
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-12
    for mine, expected in zip(state, end, strict=True):
        for a, b in zip(mine, expected, strict=True):
            assert relative_error(a, b) < 1e-6


def test_later_tokens_do_not_reach_earlier_logits():
    model = small_model()
    tokens = torch.randint(0, 256, (1, 30))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 256
    a, b = model(tokens)[0], model(changed)[0]
    assert torch.equal(a[:, :20], b[:, :20])
    assert not torch.equal(a[:, 20:], b[:, 20:])


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain, frugal = small_model(), small_model()
    frugal.grad_checkpoint = True
    tokens, labels = torch.randint(0, 256, (2, 2, 20))
    for model in (plain, frugal):
        model.loss(tokens, labels).backward()
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_every_parameter_gets_a_gradient():
    model = small_model(n_layer=3)
    model.loss(*torch.randint(0, 256, (2, 2, 20))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_loss_is_the_summed_cross_entropy_of_unmasked_labels():
    model = small_model()
    tokens, labels = torch.randint(0, 256, (2, 2, 20))
    labels[0, 5:] = -100
    logits, _ = model(tokens)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    assert torch.allclose(model.loss(tokens, labels), expected, rtol=1e-6)


def test_new_model_starts_near_uniform_and_repeats_with_its_seed():
    config = ModelConfig(n_layer=2, n_embd=64, vocab_size=256, head_size=16)
    model, again = (init_weights(RWKV6(config), seed=3) for _ in range(2))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    tokens, labels = torch.randint(0, 256, (2, 2, 32))
    mean = model.loss(tokens, labels) / labels.numel()
    assert abs(mean.item() - torch.tensor(256.0).log().item()) < 0.5


def test_released_sizes_on_the_meta_device():
    expected = {(24, 2048): 1.60e9, (32, 2560): 3.10e9, (32, 4096): 7.63e9, (61, 4096): 14.07e9}
    for (n_layer, n_embd), count in expected.items():
        with torch.device("meta"):
            model = RWKV6(ModelConfig(n_layer, n_embd, 65536))
        found = sum(p.numel() for p in model.parameters())
        assert abs(found / count - 1) < 0.01, (n_layer, n_embd, found)


def test_head_size_must_divide_n_embd():
    with pytest.raises(UserError, match="head size 48 does not divide n_embd 128"):
        ModelConfig(2, 128, 256, head_size=48)
