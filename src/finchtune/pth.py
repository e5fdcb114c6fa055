"""Writing a .pth tensor by tensor, so that never more than one need be in memory."""

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

LOCAL_HEADER = struct.Struct("<26xHH")  # the lengths of the name and of the extra field
CENTRAL_HEADER = struct.Struct("<28xHHH12x")  # the same, and the length of the comment
CENTRAL_CRC = 16  # where in a central header the checksum stands
DESCRIPTOR_MARK = b"PK\x07\x08"


def write_pth(layout: Mapping[str, Tensor], tensor_of: Callable[[str], Tensor], path: Path) -> None:
    """Write a flat dict of tensors as torch.save would, calling `tensor_of(name)` for each in turn.

    `layout` gives names, shapes and dtypes; `tensor_of` must return just these. Every tensor is
    stored by itself, contiguous. torch lays the file out without the numbers (skip_data), which
    then go to their places, with the checksums that a zip file has of them.
    """
    with FakeTensorMode():
        blank = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in layout.items()}
    # Given its path instead of the open file, torch would write the file's name into it.
    with torch.serialization.skip_data(materialize_fake_tensors=True), path.open("wb") as file:
        torch.save(blank, file)
    with zipfile.ZipFile(path) as archive:
        directory, records = archive.start_dir, archive.infolist()
    places = {record.filename.partition("/")[2]: record.header_offset for record in records}
    checksums = {}
    with path.open("r+b") as file:
        for index, (name, like) in enumerate(layout.items()):
            tensor = tensor_of(name)
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), name
            place = places[f"data/{index}"]
            checksums[place] = fill(file, place, bytes_of(tensor))
        file.seek(directory)
        for record in records:
            fix_directory_entry(file, checksums.get(record.header_offset))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in order; a contiguous one on the CPU is not copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def fill(file: BinaryIO, header: int, content: memoryview) -> int:
    """Write the content of the zip record whose header stands at `header`; return its checksum."""
    file.seek(header)
    file.seek(sum(LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))), os.SEEK_CUR)
    file.write(content)
    checksum = zlib.crc32(content)
    if len(content):
        assert file.read(4) == DESCRIPTOR_MARK
        file.write(struct.pack("<I", checksum))
    return checksum


def fix_directory_entry(file: BinaryIO, checksum: int | None) -> None:
    """Set the checksum, if there is one, of the directory entry that begins here; go past it."""
    start = file.tell()
    lengths = CENTRAL_HEADER.unpack(file.read(CENTRAL_HEADER.size))
    if checksum is not None:
        file.seek(start + CENTRAL_CRC)
        file.write(struct.pack("<I", checksum))
    file.seek(start + CENTRAL_HEADER.size + sum(lengths))
