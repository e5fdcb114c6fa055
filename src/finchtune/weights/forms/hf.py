"""Hugging Face folders whose model is code that lies beside released weights."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from finchtune.weights.forms.base import DTYPES, Form, Settings, from_form, n_layer_of
from finchtune.weights.forms.folders import generation_of_folder, read_folder, write_folder

NAME = "hf"


def recognise(path: Path) -> bool:
    """By config.json."""
    return generation_of_folder(path, NAME) is not None


def read(path: Path) -> Mapping[str, Tensor]:
    """A folder's tensors, memory-mapped."""
    theirs, generation = read_folder(path), generation_of_folder(path, NAME)
    assert generation is not None
    return from_form(theirs, NAME, generation, n_layer_of(theirs, "rwkv.blocks."), path)


def write(weights: Mapping[str, Tensor], path: Path, settings: Settings) -> None:
    """Write a folder. Raises UserError for sizes that the remote code cannot have."""
    write_folder(weights, NAME, path, settings)


FORM = Form(
    name=NAME,
    title="a Hugging Face folder (remote code)",
    dtypes=tuple(DTYPES),
    recognise=recognise,
    read=read,
    write=write,
)
