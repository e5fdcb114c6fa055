"""Documents that begin from a trained state."""

import itertools

import pytest
import torch
from helpers.support import every_generation, relative_error, small_model

from finchtune.inference.generate import generate_batch
from finchtune.models.rwkv6 import RWKV6, BlockState


def model_with_state(scale=0.5, **sizes):
    model = small_model(**sizes)
    model.add_initial_state()
    with torch.no_grad():
        for parameter in model.initial_states().values():
            parameter.normal_(0, scale)
    return model


def given_state(model, n_sequences):
    """What the model begins from, as a caller would give it."""
    blank = torch.zeros(n_sequences, model.config.n_embd)
    own = [s.mT if isinstance(model, RWKV6) else s for s in model.initial_states().values()]
    return [BlockState(blank, s.expand(n_sequences, -1, -1, -1), blank) for s in own]


@every_generation
def test_a_model_has_no_state_until_it_is_added(generation):
    model = small_model(generation=generation)
    assert model.initial_states() == {}
    expected = model(torch.arange(20)[None])[0]
    model.add_initial_state()
    assert list(model.initial_states()) == ["blocks.0.att.time_state", "blocks.1.att.time_state"]
    torch.testing.assert_close(model(torch.arange(20)[None])[0], expected)


@every_generation
def test_a_state_stands_before_the_first_token(generation):
    model, plain = model_with_state(generation=generation), small_model(generation=generation)
    tokens = torch.randint(0, 256, (2, 20))
    found = model(tokens)[0]
    torch.testing.assert_close(found, plain(tokens, given_state(model, 2))[0])
    assert relative_error(found, plain(tokens)[0]) > 0.01


@every_generation
def test_a_given_state_takes_its_place(generation):
    model, plain = model_with_state(generation=generation), small_model(generation=generation)
    tokens = torch.randint(0, 256, (2, 20))
    _, state = plain(tokens)
    torch.testing.assert_close(model(tokens, state)[0], plain(tokens, state)[0])


@every_generation
def test_every_packed_sequence_begins_from_it(generation):
    model = model_with_state(generation=generation)
    tokens = torch.randint(0, 256, (1, 30))
    bounds = torch.tensor([0, 7, 20, 30], dtype=torch.int32)
    found, _ = model.hidden(tokens, None, bounds)
    parts = [model.hidden(tokens[:, a:b])[0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(found, torch.cat(parts, 1))


@pytest.mark.parametrize("trained", [True, False])
@every_generation
def test_the_first_packed_sequences_may_go_on_while_others_begin(trained, generation):
    model = (
        model_with_state(generation=generation) if trained else small_model(generation=generation)
    )
    tokens = torch.randint(0, 256, (1, 30))
    whole = torch.tensor([0, 17, 30], dtype=torch.int32)
    expected, _ = model.hidden(tokens, None, whole)
    first, state = model.hidden(tokens[:, :9])
    rest, _ = model.hidden(tokens[:, 9:], state, torch.tensor([0, 8, 21], dtype=torch.int32))
    torch.testing.assert_close(torch.cat([first, rest], 1), expected)


@pytest.mark.parametrize("mode", [0, 1, 2])
@every_generation
def test_gradients_of_the_state(mode, generation):
    """Of a row and of packed sequences; against finite differences, in float64."""
    model = model_with_state(n_layer=1, n_embd=16, vocab_size=32, generation=generation).double()
    model.grad_checkpoint = mode
    tokens = torch.randint(0, 32, (1, 12))
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    (state,) = model.initial_states().values()

    def loss():
        return model.loss(tokens, tokens)[0] + model.loss(tokens, tokens, bounds)[0]

    (gradient,) = torch.autograd.grad(loss(), state)
    direction = torch.randn_like(state)
    with torch.no_grad():
        state.add_(1e-5 * direction)
        above = loss()
        state.sub_(2e-5 * direction)
        below = loss()
    expected = (above - below) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=0)


@every_generation
def test_every_backward_reaches_the_state(generation):
    """Its gradient is zero, not missing, where all sequences continue from given states."""
    model = model_with_state(generation=generation)
    tokens = torch.randint(0, 256, (2, 10))
    with torch.no_grad():
        _, state = model.hidden(tokens)
    model.loss(tokens, tokens, state=state)[0].backward()
    for parameter in model.initial_states().values():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@every_generation
def test_text_is_written_from_the_state(generation):
    model, plain = model_with_state(2.0, generation=generation), small_model(generation=generation)
    prompts = [[5, 6, 7], [], [9] * 30]
    found = generate_batch(model, prompts, 12, stop_tokens=())
    expected = []
    for prompt in prompts:
        tokens, state = torch.tensor([prompt or [0]]), given_state(model, 1)
        written = []
        for _ in range(12):
            logits, state = plain(tokens, state)
            tokens = logits[:, -1:].argmax(-1)
            written.append(int(tokens))
        expected.append(written)
    assert found == expected
    assert found != generate_batch(plain, prompts, 12, stop_tokens=())
