"""The model's compiled form for writing text, against the model itself."""

import itertools

import pytest
import torch
from helpers.support import every_generation, relative_error, small_model

from finchtune.adapters import attach, quantise_linears
from finchtune.models.compiled import CompiledModel
from finchtune.ops.kernels import kernels_set_aside

pytestmark = pytest.mark.usefixtures("kernels")
SHAPES = {
    "head size 8": {},
    "own F": {"head_size": 16, "dim_ffn": 200},
    "head size 64": {"n_embd": 128, "head_size": 64},
}
CU_SEQLENS = torch.tensor([0, 1, 5, 40], dtype=torch.int32)


def compiled(model):
    form = model.inference_form()
    assert isinstance(form, CompiledModel)
    return form


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@every_generation
def test_it_computes_what_the_model_does(sizes, dtype, tolerance, generation):
    """Prompts of one length, tokens one by one, and packed sequences that continue from a state."""
    model = small_model(**sizes, generation=generation).to(dtype)
    states = [None, None]
    calls = [(torch.randint(0, 256, (3, 70)), None)]
    calls += [(torch.randint(0, 256, (3, 1)), None) for _ in range(3)]
    calls += [(torch.randint(0, 256, (1, 40)), CU_SEQLENS)]
    for tokens, cu_seqlens in calls:
        results = []
        for i, form in enumerate((compiled(model), model)):
            with torch.no_grad():
                last, states[i] = form.advance(tokens, states[i], cu_seqlens)
                results.append(form.logits(last))
        assert relative_error(*results) < tolerance
        for found, expected in zip(*states, strict=True):
            for one, other in zip(found, expected, strict=True):
                assert relative_error(one, other) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("trained", [False, True])
@every_generation
def test_only_the_first_sequences_may_have_a_state(trained, generation):
    model = small_model(generation=generation)
    if trained:
        model.add_initial_state()
        for parameter in model.initial_states().values():
            torch.nn.init.normal_(parameter)
    _, state = model.advance(torch.randint(0, 256, (2, 5)))
    tokens = torch.randint(0, 256, (1, 40))
    found, states = compiled(model).advance(tokens, state, CU_SEQLENS)
    expected, others = model.advance(tokens, state, CU_SEQLENS)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(states[-1].wkv, others[-1].wkv) < 1e-5


@torch.no_grad()
@every_generation
def test_a_sequence_depends_on_no_other(generation):
    """To the last bit, in prompts packed with others and in steps with others."""
    form = compiled(small_model(n_embd=128, head_size=64, generation=generation))
    tokens, step = torch.randint(0, 256, (1, 40)), torch.randint(0, 256, (3, 1))
    last, state = form.advance(tokens, None, CU_SEQLENS)
    after, _ = form.advance(step, [type(s)(*(part.clone() for part in s)) for s in state])
    for i, (begin, end) in enumerate(itertools.pairwise(CU_SEQLENS)):
        alone, own = form.advance(tokens[:, begin:end], None, torch.tensor([0, end - begin]).int())
        assert torch.equal(alone[0], last[i])
        assert torch.equal(own[1].wkv[0], state[1].wkv[i])
        assert torch.equal(form.advance(step[i : i + 1], own)[0][0], after[i])


@torch.no_grad()
@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
@pytest.mark.parametrize("method", ["bone", "bat", "lora", "pissa", "dora"])
@every_generation
def test_adapters_run_unmerged_on_some_or_all_layers(method, quant, generation):
    if method == "dora" and quant:
        pytest.skip("DoRA needs W itself")
    tokens = torch.randint(0, 256, (2, 9))
    for targets in (None, r"blocks\.1\.(att\.key|ffn\.key)"):
        base = small_model(generation=generation)
        model = attach(base, method, r=8, targets=targets, quant=quant).eval()
        plain = compiled(model).advance(tokens)[0]
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        found, expected = (form.advance(tokens)[0] for form in (compiled(model), model))
        assert relative_error(found, expected) < 1e-5
        assert relative_error(found, plain) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("quant", ["nf4", "int8", "fp8"])
@every_generation
def test_a_quantised_base_without_adapters(quant, generation):
    model, tokens = small_model(generation=generation).eval(), torch.randint(0, 256, (2, 9))
    plain = model.advance(tokens)[0]
    quantise_linears(model, quant)
    found, expected = (form.advance(tokens)[0] for form in (compiled(model), model))
    assert relative_error(found, expected) < 1e-5
    assert relative_error(found, plain) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("method", ["bone", "bat"])
@every_generation
def test_a_sequence_with_an_adapter_depends_on_no_other(method, quant, generation):
    model = attach(small_model(generation=generation), method, r=8, quant=quant).eval()
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    form, tokens = compiled(model), torch.randint(0, 256, (5, 1))
    together, _ = form.advance(tokens)
    for row, token in zip(together, tokens, strict=True):
        assert torch.equal(form.advance(token[None])[0][0], row)


@every_generation
def test_it_is_for_cpus_with_kernels_and_one_dtype(generation):
    model = small_model(generation=generation)
    assert model.double().inference_form() is model
    mixed = small_model(generation=generation).bfloat16()
    mixed.head.float()
    assert mixed.inference_form() is mixed
    model = small_model(generation=generation)
    with kernels_set_aside():
        assert model.inference_form() is model
