"""rwkv.cpp: its own binary file, in fp32 or fp16. Source: RWKV/rwkv.cpp, docs/FILE_FORMAT.md."""

import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from finchtune.errors import CheckpointError, UserError
from finchtune.models import generation_of
from finchtune.weights.forms.base import (
    DTYPES,
    Form,
    Settings,
    converted,
    from_form,
    layout_in,
    n_layer_of,
    recognised,
    to_form,
)
from finchtune.weights.hashing import HashingWriter
from finchtune.weights.lazy import layout_of, mapped
from finchtune.weights.pth import bytes_of

NAME = "rwkv.cpp"
MAGIC, VERSION = 0x67676D66, 101
HEADER = struct.Struct("=IiiiiI")  # magic, version, vocabulary, n_embd, layers, dtype
TENSOR = struct.Struct("=iii")  # dimensions, length of the name, dtype
CODES = {torch.float32: 0, torch.float16: 1}
MOST_DIMENSIONS, LONGEST_NAME = 3, 256


class Place(NamedTuple):
    """Where in the file a tensor's numbers lie, and how."""

    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def recognise(path: Path) -> bool:
    """By the magic number."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == struct.pack("=I", MAGIC)


def read(path: Path) -> Mapping[str, Tensor]:
    """A model's tensors, memory-mapped."""
    places = scan(path)
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    theirs = {
        name: torch.frombuffer(
            content, dtype=p.dtype, count=torch.Size(p.shape).numel(), offset=p.begin
        ).view(p.shape)
        for name, p in places.items()
    }
    generation = recognised(NAME, {name: place.shape for name, place in places.items()})
    if generation is None:
        raise CheckpointError(f"{path} holds no generation of RWKV that is known here")
    return from_form(theirs, NAME, generation, n_layer_of(theirs, "blocks."), path)


def scan(path: Path) -> dict[str, Place]:
    """Every tensor's place. Raises UserError for another version, and for a damaged file."""
    places: dict[str, Place] = {}
    dtypes = {code: dtype for dtype, code in CODES.items()}
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            version = HEADER.unpack(file.read(HEADER.size))[1]
            if version != VERSION:
                raise CheckpointError(
                    f"{path}: version {version} of rwkv.cpp's form is not known here"
                )
            while file.tell() < size:
                n_dims, length, code = TENSOR.unpack(file.read(TENSOR.size))
                if code not in dtypes:
                    raise CheckpointError(f"{path} is quantised; give the file it was made from")
                if not 0 < n_dims <= MOST_DIMENSIONS or not 0 < length <= LONGEST_NAME:
                    raise ValueError("a tensor's header makes no sense")
                shape = struct.unpack(f"={n_dims}i", file.read(4 * n_dims))[::-1]
                name = file.read(length).decode()
                if min(shape) < 1 or name in places:
                    raise ValueError(f"{name} is {list(shape)}, or stands there twice")
                places[name] = Place(file.tell(), shape, dtypes[code])
                n_bytes = torch.Size(shape).numel() * dtypes[code].itemsize
                if file.seek(n_bytes, 1) > size:
                    raise ValueError(f"{name} continues after the end")
        except (struct.error, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise CheckpointError(
                f"{path} ({size:,} bytes): damaged or cut short ({error}); copy it again"
            ) from error
    return places


def write(weights: Mapping[str, Tensor], path: Path, settings: Settings) -> str:
    """Write a model; vectors and small matrices stay fp32. Returns the file's sha256."""
    layout = layout_of(weights)
    dtype = DTYPES[settings.dtype]
    n_layer = n_layer_of(layout, "blocks.")
    precise = layout_in(NAME, generation_of(layout)).precise

    def stored(name: str, tensor: Tensor) -> Tensor:
        small = tensor.dim() == 1 or re.search(precise, name)
        return converted(name, tensor, torch.float32 if small else dtype)

    theirs = mapped(to_form(weights, NAME), stored)
    vocab_size, n_embd = layout["emb.weight"].shape
    with HashingWriter(path.open("wb")) as file:
        file.write(HEADER.pack(MAGIC, VERSION, vocab_size, n_embd, n_layer, CODES[dtype]))
        for name, tensor in theirs.items():
            raw = name.encode()
            shape = tensor.shape[::-1]
            file.write(TENSOR.pack(len(shape), len(raw), CODES[tensor.dtype]))
            file.write(struct.pack(f"={len(shape)}i", *shape) + raw)
            file.write(bytes_of(tensor))
        return file.sha256()


FORM = Form(
    name=NAME,
    title="rwkv.cpp's file",
    suffix=".bin",
    dtypes=("fp16", "fp32"),
    recognise=recognise,
    read=read,
    write=write,
)
