"""The model generations, a folder each, and what everything else asks of a model."""

from finchtune.models.config import ModelSizes
from finchtune.models.generations import (
    Generation,
    generation_of,
    generation_of_sizes,
    generations,
    meta_model,
    released_sizes,
    sizes_of,
    standard_form,
)
from finchtune.models.language_model import INITIAL_STATE, Head, LanguageModel, State

__all__ = [
    "INITIAL_STATE",
    "Generation",
    "Head",
    "LanguageModel",
    "ModelSizes",
    "State",
    "generation_of",
    "generation_of_sizes",
    "generations",
    "meta_model",
    "released_sizes",
    "sizes_of",
    "standard_form",
]
