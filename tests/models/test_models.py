"""The model against the independent `rwkv` package, its own other forms, and its formulas."""

import contextlib

import pytest
import torch
from helpers.support import (
    NUMBERS,
    every_generation,
    peak_bytes,
    relative_error,
    rwkv_package,
    rwkv_package_greedy,
    rwkv_package_logits,
    save_model,
    small_model,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import finchtune
from finchtune.adapters import attach
from finchtune.errors import UserError
from finchtune.inference.generate import generate_batch
from finchtune.models import meta_model, recompute, released_sizes
from finchtune.models.rwkv6 import ModelConfig
from finchtune.ops import kernels
from finchtune.ops.elementwise import plain

SHAPES = {
    "head size 8": (6, {"n_layer": 2, "n_embd": 64, "head_size": 8}),
    "head size 64": (6, {"n_layer": 2, "n_embd": 128, "head_size": 64}),
    "odd layers, own F": (6, {"n_layer": 3, "n_embd": 64, "head_size": 16, "dim_ffn": 200}),
    "RWKV-7": (7, {"n_layer": 2, "n_embd": 128, "head_size": 64}),
    "RWKV-7, one layer": (7, {"n_layer": 1, "n_embd": 64, "head_size": 8}),
    "RWKV-7, odd sizes and ranks": (
        7,
        {
            **{"n_layer": 3, "n_embd": 60, "head_size": 20, "dim_ffn": 200, "dim_decay_lora": 7},
            **{"dim_rate_lora": 9, "dim_value_lora": 5, "dim_gate_lora": 11, "dim_unused_lora": 3},
        },
    ),
}


@torch.no_grad()
@pytest.mark.parametrize(("generation", "sizes"), SHAPES.values(), ids=SHAPES)
def test_logits_and_states_equal_the_rwkv_package(tmp_path, generation, sizes):
    made = small_model(generation=generation, **sizes)
    path = save_model(made, tmp_path / "model.pth")
    model = finchtune.load_model(path)
    assert model.config == made.config
    tokens = torch.randint(1, 256, (1, 45))
    logits, _ = model(tokens)
    expected = rwkv_package_logits(path, tokens[0].tolist())
    assert relative_error(logits[0], expected) < 1e-5
    for n in (1, 2, 16, 45):
        _, state = model(tokens[:, :n])
        _, theirs = rwkv_package(path).forward(tokens[0, :n].tolist(), None)
        for layer, block in enumerate(state):
            for part, other in zip(block, theirs[3 * layer : 3 * layer + 3], strict=True):
                assert relative_error(part[0], other.view_as(part[0])) < 1e-5


@every_generation
def test_greedy_text_equals_the_rwkv_packages(tmp_path, generation):
    path = save_model(small_model(generation=generation), tmp_path / "model.pth")
    prompt = torch.randint(1, 256, (20,)).tolist()
    (found,) = generate_batch(finchtune.load_model(path), [prompt], 100, stop_tokens=())
    assert found == rwkv_package_greedy(path, prompt, 100)


def test_logits_of_a_trained_model_equal_the_rwkv_package(trained_model):
    text = "User: Ada has 5 apples and finds 3 more. How many apples now?"
    tokens = torch.tensor([list(text.encode())])
    logits, _ = finchtune.load_model(trained_model)(tokens)
    expected = rwkv_package_logits(trained_model, tokens[0].tolist())
    assert relative_error(logits[0], expected) < 1e-4
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()
    assert loss < 2.0, "a trained model predicts text of its own kind"


@every_generation
def test_recurrent_form_equals_parallel_form(generation):
    model = small_model(generation=generation).double()
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


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@every_generation
def test_packed_sequences_take_and_return_a_state_each(compiled, generation):
    """Their hidden states, states and gradients are those of one sequence at a time."""
    model, lengths = small_model(head_size=16, generation=generation), (1, 9, 30)
    pieces = [torch.randint(0, 256, (1, 2 * length)) for length in lengths]
    firsts, seconds = zip(*(piece.chunk(2, dim=1) for piece in pieces), strict=True)
    cu_seqlens = torch.tensor([0, 1, 10, 40], dtype=torch.int32)
    with contextlib.nullcontext() if compiled else kernels.kernels_set_aside():
        _, state = model.hidden(torch.cat(firsts, 1), cu_seqlens=cu_seqlens)
        packed, state = model.hidden(torch.cat(seconds, 1), state, cu_seqlens)
        expected, states = [], []
        for first, second in zip(firsts, seconds, strict=True):
            hidden, alone = model.hidden(second, model.hidden(first)[1])
            expected.append(hidden)
            states.append(alone)
    assert relative_error(packed, torch.cat(expected, 1)) < 1e-5
    weight = torch.randn(packed.shape)
    gradients = [
        torch.autograd.grad((hidden * weight).sum(), list(model.blocks[0].parameters()))
        for hidden in (packed, torch.cat(expected, 1))
    ]
    for found, wanted in zip(*gradients, strict=True):
        assert relative_error(found, wanted) < 1e-4
    for layer, block in enumerate(state):
        for part, found in enumerate(block):
            wanted = torch.cat([alone[layer][part] for alone in states])
            assert relative_error(found, wanted) < 1e-5


@every_generation
def test_later_tokens_do_not_reach_earlier_logits(generation):
    model = small_model(generation=generation)
    tokens = torch.randint(0, 256, (1, 30))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 256
    a, b = model(tokens)[0], model(changed)[0]
    assert torch.equal(a[:, :20], b[:, :20])
    assert not torch.equal(a[:, 20:], b[:, 20:])


METHODS = [
    ("none", {}),
    *(("bone", {"r": 8}), ("bat", {"r": 8}), ("lora", {"r": 4}), ("pissa", {"r": 4})),
]


@pytest.mark.parametrize(("peft", "settings"), METHODS)
@every_generation
def test_recomputing_changes_nothing_but_memory(monkeypatch, peft, settings, generation):
    monkeypatch.setattr(recompute, "THIN", 32)  # so that this small model has large products
    tokens, labels = torch.randint(0, 256, (2, 4, 64))
    gradients, kept = [], []
    for mode in (0, 1, 2):
        torch.manual_seed(1)
        model = small_model(n_layer=5, generation=generation)
        if peft != "none":
            attach(model, peft, **settings)
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.grad_checkpoint = mode
        kept.append(peak_bytes(lambda model=model: model.loss(tokens, labels)[0].backward()))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for mode in (1, 2):
        for name, gradient in gradients[0].items():
            assert torch.equal(gradients[mode][name], gradient), (mode, name)
    assert kept[1] < kept[2] < kept[0], "each mode keeps what it says"


@pytest.mark.parametrize("peft", ["bone", "bat", "lora"])
@every_generation
def test_selective_recomputation_makes_no_product_with_W_again(peft, generation):
    model = attach(small_model(n_layer=3, generation=generation), peft, r=8)
    names = {"bone": "bone", "bat": "bat_row", "lora": "product_plus"}
    operator = getattr(torch.ops.finchtune, names[peft])
    tokens = torch.randint(0, 256, (2, 64))
    counts = []
    for model.grad_checkpoint in (0, 1, 2):
        with FlopCounterMode(display=False) as counter:
            model.loss(tokens, tokens)[0].backward()
        counts.append(counter.get_flop_counts()["Global"][operator])
    assert counts[2] == counts[0] < counts[1]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (plain.Mixtures, [(6, 4), (6, 4), (4,), (5, 1, 4), (4, 15), (5, 3, 4)]),
        (plain.Gate, [(6, 4), (6, 4)]),
        (plain.SquaredReLU, [(6, 4)]),
    ],
)
def test_written_out_gradients_are_those_of_the_function(function, shapes):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function.apply, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squared_relu_keeps_what_the_linear_after_it_keeps(dtype):
    """Its result alone, whose root gives the gradient to the last bit."""
    kept = set()

    def pack(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    x = (4 * torch.randn(2**20)).to(dtype).requires_grad_()
    weight = nn.Parameter(torch.ones((), dtype=dtype))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = plain.SquaredReLU.apply(x) * weight
    assert len(kept) == 2, "the result and the weight"
    dy = torch.randn(2**20).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, x.detach().relu() * dy * 2)


@pytest.mark.parametrize("starts", [None, [0], [0, 3, 4]])
def test_gradients_of_the_shift(starts):
    x = torch.randn(1 if starts else 2, 7, 3, dtype=torch.float64, requires_grad=True)
    last = torch.randn(len(starts or x), 3, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor(starts) if starts else None
    assert torch.autograd.gradcheck(plain.ShiftDifference.apply, (x, last, starts))


@every_generation
def test_every_parameter_gets_a_gradient(generation):
    model = small_model(n_layer=3, generation=generation)
    model.loss(*torch.randint(0, 256, (2, 2, 20)))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@every_generation
def test_loss_is_the_summed_cross_entropy_of_unmasked_labels(generation):
    model = small_model(generation=generation)
    tokens, labels = torch.randint(0, 256, (2, 2, 20))
    labels[0, 5:] = -100
    logits, _ = model(tokens)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    assert torch.allclose(model.loss(tokens, labels)[0], expected, rtol=1e-6)


@every_generation
def test_new_model_starts_near_uniform_and_repeats_with_its_seed(generation):
    made = NUMBERS[generation]
    config = made.sizes(n_layer=2, n_embd=64, vocab_size=256, head_size=16)
    model, again = (made.init_weights(made.model(config, 0), seed=3) for _ in range(2))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    tokens, labels = torch.randint(0, 256, (2, 2, 32))
    mean = model.loss(tokens, labels)[0] / labels.numel()
    assert abs(mean.item() - torch.tensor(256.0).log().item()) < 0.5


def test_released_sizes_on_the_meta_device():
    expected = {
        **{"1.6B": 1.60e9, "3B": 3.10e9, "7B": 7.63e9, "14B": 14.07e9},
        **{"0.1B": 0.191e9, "0.4B": 0.451e9, "1.5B": 1.527e9, "2.9B": 2.948e9},
        **{"7.2B": 7.199e9, "13.3B": 13.27e9},
    }
    found = released_sizes()
    assert found.keys() == expected.keys()
    for name, count in expected.items():
        n_parameters = sum(p.numel() for p in meta_model(found[name]).parameters())
        assert abs(n_parameters / count - 1) < 0.002, name


def test_head_size_must_divide_n_embd():
    with pytest.raises(UserError, match="head size 48 does not divide n_embd 128"):
        ModelConfig(2, 128, 256, head_size=48)


@pytest.mark.slow
@pytest.mark.parametrize("quant", [None, "nf4"])
@every_generation
def test_an_adapted_model_compiles(quant, generation):
    model = attach(small_model(generation=generation), "bone", r=8, quant=quant)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0, 0.02)
    tokens = torch.randint(1, 256, (2, 16))
    expected = model.loss(tokens, tokens)[0]
    wanted = torch.autograd.grad(expected, trained)
    torch._dynamo.reset()
    found, _ = torch.compile(model.loss, backend="aot_eager")(tokens, tokens)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, trained), wanted, rtol=1e-4, atol=1e-4)
