"""Writing a .pth tensor by tensor, so that never more than one need be in memory."""

import json
import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.weights.hashing import HashingWriter, in_parts

LOCAL_HEADER = struct.Struct("<26xHH")  # the lengths of the name and of the extra field
CRC_PLACE = 16  # where in a directory entry the checksum stands
AFTER_CRC = struct.Struct("<8xHHH12x")  # of the entry: lengths of name, extra field and comment
DESCRIPTOR_MARK = b"PK\x07\x08"
RECORD = "extra/finchtune.json"  # beside torch's own members, which alone other readers look at
LARGEST_RECORD = 1 << 24  # bytes

UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, EOFError)


def write_pth(
    layout: Mapping[str, Any],
    tensors: Iterable[Tensor | Iterable[Tensor]],
    path: Path,
    record: Mapping[str, Any] | None = None,
) -> str:
    """Write a dict of tensors as torch.save would, taking one after another; return its sha256.

    `layout` is the dict, which may hold plain values and further dicts; of its tensors only names,
    shapes and dtypes count. `tensors` yields those with the numbers, in the same order, each whole
    or in pieces one after another. Each is stored by itself, contiguous. torch lays the file out
    without the numbers (skip_data), which then go to their places, with the checksums that a zip
    file has of them. `record` is put into the file as JSON, where `read_record` finds it and other
    readers do not look.
    """
    blank = without_numbers(layout, room_for(layout))
    # Given its path instead of the open file, torch would write the file's name into it.
    with torch.serialization.skip_data(), path.open("wb") as file:
        torch.save(blank, file)
    if record is not None:
        add_record(path, record)
    with zipfile.ZipFile(path) as archive:
        directory, entries = archive.start_dir, archive.infolist()
    checksums = {}
    with HashingWriter(path.open("r+b")) as written:
        places = [e.header_offset for e in entries if e.filename.partition("/")[2][:5] == "data/"]
        for place, like, tensor in zip(places, tensors_of(layout), tensors, strict=True):
            written.keep(place - written.file.tell())
            checksums[place] = fill(written, tensor, like)
        written.keep(directory - written.file.tell())
        for entry in entries:
            fix_directory_entry(written, checksums.get(entry.header_offset))
        written.keep()
        return written.sha256()


def add_record(path: Path, record: Mapping[str, Any]) -> None:
    """Put a record into a .pth as a member of its own."""
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        # Without a date of its own, so that the same content gives the same file.
        archive.writestr(zipfile.ZipInfo(f"{folder}/{RECORD}"), json.dumps(record, indent=2))


def read_record(path: Path) -> Any:
    """The record in a .pth, None if it has none. Raises UserError if it cannot be read."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.partition("/")[2] == RECORD]
            if not names:
                return None
            if len(names) > 1 or archive.getinfo(names[0]).file_size > LARGEST_RECORD:
                raise CheckpointError(f"{path}: its record is damaged; download or copy it again")
            return json.loads(archive.read(names[0]))
    except (*UNREADABLE, RecursionError) as error:
        raise CheckpointError(f"{path}: its record is damaged ({error}); copy it again") from error


def check_members(path: Path) -> None:
    """Raise UserError unless all of a .pth matches the checksums that a zip file has of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except UNREADABLE as error:
        damaged = str(error)
    if damaged:
        raise CheckpointError(f"{path}: does not match its checksums ({damaged}); copy it again")


def tensors_of(layout: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors in a dict and in the dicts in it, in order."""
    for value in layout.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors_of(value)


def room_for(layout: Mapping[str, Any]) -> dict[torch.dtype, mmap.mmap]:
    """Address space, never touched, for the largest tensor of each dtype.

    torch refuses to save one memory as two dtypes.
    """
    largest: dict[torch.dtype, int] = {}
    for tensor in tensors_of(layout):
        size = tensor.numel() * tensor.element_size()
        largest[tensor.dtype] = max(size, largest.get(tensor.dtype, 1))
    return {dtype: mmap.mmap(-1, size) for dtype, size in largest.items()}


def without_numbers(
    layout: Mapping[str, Any], room: Mapping[torch.dtype, mmap.mmap]
) -> dict[str, Any]:
    """The same dict with tensors of no content, all in the same memory, instead of its own."""
    blank: dict[str, Any] = {}
    for name, value in layout.items():
        if isinstance(value, Mapping):
            blank[name] = without_numbers(value, room)
        elif isinstance(value, Tensor) and value.numel():
            content = torch.frombuffer(room[value.dtype], dtype=value.dtype, count=value.numel())
            blank[name] = content.view(value.shape)
        elif isinstance(value, Tensor):
            blank[name] = torch.empty(value.shape, dtype=value.dtype)
        else:
            blank[name] = value
    return blank


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in order; a contiguous one on the CPU is not copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def fill(written: HashingWriter, tensor: Tensor | Iterable[Tensor], like: Tensor) -> int:
    """Write a tensor as the content of the zip record that begins here; return its checksum."""
    written.keep(sum(LOCAL_HEADER.unpack(written.keep(LOCAL_HEADER.size))))
    checksum = size = 0
    for piece in [tensor] if isinstance(tensor, Tensor) else tensor:
        assert piece.dtype == like.dtype
        for part in in_parts(bytes_of(piece)):
            written.write(part)
            checksum, size = zlib.crc32(part, checksum), size + len(part)
    assert size == like.numel() * like.element_size()
    if size:
        assert written.keep(4) == DESCRIPTOR_MARK
        written.write(struct.pack("<I", checksum))
    return checksum


def fix_directory_entry(written: HashingWriter, checksum: int | None) -> None:
    """Set the checksum, if there is one, of the directory entry that begins here; go past it."""
    written.keep(CRC_PLACE)
    if checksum is None:
        written.keep(4)
    else:
        written.write(struct.pack("<I", checksum))
    written.keep(sum(AFTER_CRC.unpack(written.keep(AFTER_CRC.size))))
