"""Plain .pth: the form that RWKV weights are released in, and that of `rwkv` and RWKV-Runner."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from finchtune.weights.forms.base import DTYPES, Form, Settings, converted
from finchtune.weights.lazy import layout_of, mapped
from finchtune.weights.pth import write_pth
from finchtune.weights.tensors import read_tensors


def recognise(path: Path) -> bool:
    """torch's zip files, and its older pickles."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(2)
    return start[:1] == b"\x80" or (start == b"PK" and zipfile.is_zipfile(path))


def write(weights: Mapping[str, Tensor], path: Path, settings: Settings) -> str:
    """Write the tensors in one dtype; returns the file's sha256."""
    dtype = DTYPES[settings.dtype]
    weights = mapped(weights, lambda name, tensor: converted(name, tensor, dtype))
    return write_pth(layout_of(weights), weights.values(), path)


FORM = Form(
    name="pth",
    title="a plain .pth",
    suffix=".pth",
    dtypes=tuple(DTYPES),
    recognise=recognise,
    read=read_tensors,
    write=write,
    write_states=write,
)
