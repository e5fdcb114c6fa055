"""Writing a .pth tensor by tensor, so that never more than one need be in memory."""

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

LOCAL_HEADER = struct.Struct("<26xHH")  # the lengths of the name and of the extra field
CRC_PLACE = 16  # where in a directory entry the checksum stands
AFTER_CRC = struct.Struct("<8xHHH12x")  # of the entry: lengths of name, extra field and comment
DESCRIPTOR_MARK = b"PK\x07\x08"


def write_pth(layout: Mapping[str, Any], tensors: Iterable[Tensor], path: Path) -> str:
    """Write a dict of tensors as torch.save would, taking one after another; return its sha256.

    `layout` is the dict, which may hold plain values and further dicts; of its tensors only names,
    shapes and dtypes count. `tensors` yields those with the numbers, in the same order. Each is
    stored by itself, contiguous. torch lays the file out without the numbers (skip_data), which
    then go to their places, with the checksums that a zip file has of them.
    """
    with FakeTensorMode():
        blank = without_numbers(layout)
    # Given its path instead of the open file, torch would write the file's name into it.
    with torch.serialization.skip_data(materialize_fake_tensors=True), path.open("wb") as file:
        torch.save(blank, file)
    with zipfile.ZipFile(path) as archive:
        directory, records = archive.start_dir, archive.infolist()
    checksums = {}
    with path.open("r+b") as file:
        written = Pass(file)
        places = [r.header_offset for r in records if r.filename.partition("/")[2][:5] == "data/"]
        for place, like, tensor in zip(places, tensors_of(layout), tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
            written.keep_to(place)
            checksums[place] = fill(written, bytes_of(tensor))
        written.keep_to(directory)
        for record in records:
            fix_directory_entry(written, checksums.get(record.header_offset))
        written.keep(-1)
    return written.sha256.hexdigest()


def tensors_of(layout: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors in a dict and in the dicts in it, in order."""
    for value in layout.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors_of(value)


def without_numbers(layout: Mapping[str, Any]) -> dict[str, Any]:
    """The same dict with empty tensors instead of its own."""
    blank: dict[str, Any] = {}
    for name, value in layout.items():
        if isinstance(value, Mapping):
            blank[name] = without_numbers(value)
        elif isinstance(value, Tensor):
            blank[name] = torch.empty(value.shape, dtype=value.dtype)
        else:
            blank[name] = value
    return blank


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in order; a contiguous one on the CPU is not copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class Pass:
    """Goes through a file once, keeping or replacing its bytes, and hashes what is then there."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def keep(self, n_bytes: int) -> bytes:
        """Leave so many bytes as they are, -1 for all that are left; returns them."""
        content = self.file.read(n_bytes)
        self.sha256.update(content)
        return content

    def keep_to(self, place: int) -> None:
        """Leave everything before `place` as it is."""
        self.keep(place - self.file.tell())

    def replace(self, content: bytes | memoryview) -> None:
        """Write over as many bytes."""
        self.file.write(content)
        self.sha256.update(content)


def fill(written: Pass, content: memoryview) -> int:
    """Write the content of the zip record that begins here; return its checksum."""
    written.keep(sum(LOCAL_HEADER.unpack(written.keep(LOCAL_HEADER.size))))
    written.replace(content)
    checksum = zlib.crc32(content)
    if len(content):
        assert written.keep(4) == DESCRIPTOR_MARK
        written.replace(struct.pack("<I", checksum))
    return checksum


def fix_directory_entry(written: Pass, checksum: int | None) -> None:
    """Set the checksum, if there is one, of the directory entry that begins here; go past it."""
    written.keep(CRC_PLACE)
    if checksum is None:
        written.keep(4)
    else:
        written.replace(struct.pack("<I", checksum))
    written.keep(sum(AFTER_CRC.unpack(written.keep(AFTER_CRC.size))))
