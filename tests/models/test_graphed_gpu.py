"""Writing by CUDA graphs gives what the model itself does."""

import pytest
import torch
from helpers.support import every_generation, relative_error, small_model

from finchtune.adapters import attach
from finchtune.models.graphed import GraphedModel
from finchtune.ops.kernels import kernels_set_aside

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@every_generation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_those_without_a_graph(generation, dtype):
    model = small_model(generation=generation, head_size=64, n_embd=128).to("cuda", dtype)
    form = model.inference_form()
    assert isinstance(form, GraphedModel)
    with torch.no_grad():
        _, state = model.advance(torch.randint(256, (3, 20), device="cuda"))
        other = state
        for step in range(12):
            rows = 3 if step < 6 else 2  # a row leaves
            if step == 6:
                state, other = (
                    [type(s)(*(x[:2] for x in s)) for s in one] for one in (state, other)
                )
            tokens = torch.randint(256, (rows, 1), device="cuda")
            expected, state = model.advance(tokens, state)
            found, other = form.advance(tokens, other)
            torch.testing.assert_close(form.logits(found), model.logits(expected))
    assert set(form.steps) == {2, 3}


@pytest.mark.parametrize("quant", ["nf4", "int8", "fp8"])
def test_quantised_bases_are_multiplied_with_by_their_codes_in_a_graph(quant):
    model = attach(small_model(head_size=64, n_embd=128), "bone", r=8, quant=quant).eval()
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.to("cuda", torch.bfloat16)
    form, tokens = model.inference_form(), torch.randint(256, (2, 1), device="cuda")
    with torch.no_grad(), kernels_set_aside():
        expected, state = model.advance(tokens)
        expected = model.advance(tokens, state)[0]
    with torch.no_grad():
        _, state = model.advance(tokens)
        for _ in range(3):
            found, _ = form.advance(tokens, state)
    assert set(form.steps) == {2}
    assert relative_error(found, expected) < 0.05


def test_a_state_that_was_returned_is_not_written_to():
    model = small_model(head_size=64, n_embd=128).cuda()
    form = model.inference_form()
    tokens = torch.randint(256, (1, 1), device="cuda")
    with torch.no_grad():
        _, state = model.advance(tokens)
        states = [state]
        for _ in range(4):
            states.append(form.advance(tokens, states[-1])[1])
        again = form.advance(tokens, states[1])[1]
    for one, other in zip(again, states[2], strict=True):
        torch.testing.assert_close(one.wkv, other.wkv)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_than_the_current_gpu_is_recorded_there():
    model = small_model(head_size=64, n_embd=128).to("cuda:1")
    form, tokens = model.inference_form(), torch.randint(256, (2, 1), device="cuda:1")
    with torch.no_grad():
        _, state = model.advance(tokens)
        expected = model.advance(tokens, state)[0]
        for _ in range(3):
            found, _ = form.advance(tokens, state)
    assert set(form.steps) == {2}
    torch.testing.assert_close(found, expected)
    assert torch.cuda.current_device() == 0
