"""Safetensors with the official names: the same tensors as in a plain .pth."""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.models import generations
from finchtune.weights.forms.base import DTYPES, Form, Settings, converted, recognised
from finchtune.weights.hashing import HashingWriter
from finchtune.weights.lazy import layout_of, mapped, pieces_of
from finchtune.weights.pth import bytes_of

METADATA = "__metadata__"
HEADER_LENGTH = struct.Struct("<Q")
LARGEST_HEADER = 100_000_000  # the library's own limit
NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
DTYPE_NAMES = {DTYPES[ours]: theirs for ours, theirs in NAMES.items()}


def is_safetensors(path: Path) -> bool:
    """Whether a file starts as this format does: a length, then a JSON object."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(HEADER_LENGTH.size + 1)
    if len(start) <= HEADER_LENGTH.size or start[-1:] != b"{":
        return False
    return HEADER_LENGTH.unpack(start[:-1])[0] <= LARGEST_HEADER


def header_of(path: Path) -> dict[str, Any]:
    """A file's header: name -> dtype, shape and place. Raises UserError if it is damaged."""
    with path.open("rb") as file:
        start = file.read(HEADER_LENGTH.size)
        length = HEADER_LENGTH.unpack(start)[0] if len(start) == HEADER_LENGTH.size else 0
        content = file.read(min(length, LARGEST_HEADER))
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or cut short; download or copy it again") from error
    if not isinstance(header, dict) or not all(is_entry(*entry) for entry in header.items()):
        raise CheckpointError(f"{path}: damaged; download or copy it again")
    return header


def is_entry(name: str, entry: Any) -> bool:
    """Whether a header's entry is one of a tensor, or the metadata."""
    if not isinstance(entry, dict):
        return False
    shape = entry.get("shape")
    return name == METADATA or (isinstance(shape, list) and all(type(n) is int for n in shape))


def shapes_of(path: Path) -> dict[str, list[int]]:
    """The shapes of a file's tensors."""
    header = header_of(path)
    return {name: entry["shape"] for name, entry in header.items() if name != METADATA}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A file's tensors, memory-mapped, in the order in which they lie in it."""
    from safetensors import SafetensorError, safe_open

    size = f"{path.stat().st_size:,} bytes"
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} ({size}): damaged or cut short ({error}); download or copy it again"
        ) from error


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> str:
    """Write named tensors one after another; returns the file's sha256.

    The library's own writer takes all of them at once. Layout: the header's length in 8 bytes, the
    header in JSON, padded with spaces to 8 bytes, the tensors end to end.
    """
    header: dict[str, Any] = {METADATA: {"format": "pt"} | dict(metadata or {})}
    end = 0
    for name, tensor in layout_of(tensors).items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with HashingWriter(path.open("wb")) as file:
        file.write(HEADER_LENGTH.pack(len(content)) + content)
        for name in tensors:
            for piece in pieces_of(tensors, name):
                file.write(bytes_of(piece))
        return file.sha256()


def recognise(path: Path) -> bool:
    """Safetensors with a model's official names."""
    if not is_safetensors(path):
        return False
    shapes = shapes_of(path)
    of_any = any(re.search(one.recognised_by, n) for one in generations().values() for n in shapes)
    return of_any and recognised("web-rwkv", shapes) is None


def write(weights: Mapping[str, Tensor], path: Path, settings: Settings) -> str:
    """Write the tensors in one dtype; returns the file's sha256."""
    dtype = DTYPES[settings.dtype]
    return write_safetensors(mapped(weights, lambda n, t: converted(n, t, dtype)), path)


FORM = Form(
    name="safetensors",
    title="safetensors with the official names",
    suffix=".safetensors",
    dtypes=tuple(DTYPES),
    recognise=recognise,
    read=read_safetensors,
    write=write,
)
