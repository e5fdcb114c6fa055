"""Models of random weights for benchmarks, of any generation."""

import argparse
from dataclasses import replace

import torch

from finchtune.models.config import ModelSizes
from finchtune.models.generations import by_number, generation_of_sizes
from finchtune.models.language_model import LanguageModel

NUMBERS = by_number()


def add_generation(parser: argparse.ArgumentParser) -> None:
    """--generation, which models are made of."""
    parser.add_argument("--generation", type=int, choices=NUMBERS, default=6, help="of RWKV [6]")


def sizes_of(
    generation: int, n_layer: int, n_embd: int, vocab_size: int, head_size: int = 64
) -> ModelSizes:
    """Sizes of a model; those that are not given are a released model's of that width."""
    for released in NUMBERS[generation].released.values():
        if released.n_embd == n_embd:
            given = {"n_layer": n_layer, "vocab_size": vocab_size, "head_size": head_size}
            return replace(released, **given)
    return NUMBERS[generation].sizes(n_layer, n_embd, vocab_size, head_size=head_size)


def initialised(sizes: ModelSizes, grad_checkpoint: int = 0, seed: int = 0) -> LanguageModel:
    """A model as training from scratch begins with."""
    generation = generation_of_sizes(sizes)
    return generation.init_weights(generation.model(sizes, grad_checkpoint), seed)


@torch.no_grad()
def stirred(sizes: ModelSizes) -> LanguageModel:
    """A model of random weights in which no tensor is zero."""
    model = initialised(sizes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = 0.02 if parameter.dim() == 2 else 0.1
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model
