"""Adapters on tiny Hugging Face models built from their configurations (nothing is downloaded)."""

import copy

import pytest
import torch
from torch import nn

from finchtune.adapters import (
    adapted_layers,
    adapter_state,
    attach,
    load_adapter_state,
    merge,
)

pytestmark = pytest.mark.slow  # importing transformers takes seconds

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
DECODER = [*ATTENTION, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
ENCODER = [
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
]
TOKENS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
METHODS = {
    "bone": {"r": 8},
    "bat": {"r": 8},
    "lora": {"r": 4, "alpha": 8},
    "pissa": {"r": 4},
    "dora": {"r": 4},
}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    # Fewer heads for keys and values: their layers are not square.
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8))


def roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(**SIZES, num_labels=3, max_position_embeddings=32)
    return RobertaForSequenceClassification(config)


MODELS = {
    "llama": (llama, "model.layers", DECODER),
    "mistral": (mistral, "model.layers", DECODER),
    "roberta": (roberta, "roberta.encoder.layer", ENCODER),
}


def loss_of(model: nn.Module) -> torch.Tensor:
    labels = TOKENS if hasattr(model, "lm_head") else torch.tensor([0, 1, 2, 0])
    return model(input_ids=TOKENS, labels=labels).loss


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_attach_train_save_load_merge(name, method):
    build, layers, linears = MODELS[name]
    base = build().eval()
    model = attach(copy.deepcopy(base), method, **METHODS[method])
    assert sorted(adapted_layers(model)) == sorted(
        f"{layers}.{i}.{linear}" for i in range(2) for linear in linears
    )
    before = logits_of(base)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-5)
    losses = train(model, 12)
    assert losses[-1] < losses[0] - 0.05
    trained = logits_of(model)
    assert (trained - before).abs().max() > 0.01
    frozen = [key for key in base.state_dict() if key in model.state_dict()]
    assert all(torch.equal(model.state_dict()[key], base.state_dict()[key]) for key in frozen)

    again = attach(copy.deepcopy(base), init=False, **model.adapter_spec)
    load_adapter_state(again, adapter_state(model))
    assert torch.equal(logits_of(again), trained)
    whole = attach(build().eval(), init=False, **model.adapter_spec)
    whole.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits_of(whole), trained)

    merge(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits_of(model), trained, rtol=1e-4, atol=1e-4)
    plain = build().eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits_of(plain), logits_of(model))
