"""Fuzzing the .bin/.idx reader and the JSON reader: `python tests/fuzz_reader.py -runs=100000`.

Guided by coverage, with atheris. The two checks are what the reader must keep to whatever bytes
it is given; test_fuzz.py lets hypothesis make some too.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

from finchtune.data.binidx import BinIdx, _read_index
from finchtune.data.records import _parse_flat, parse_line
from finchtune.data.values import BadRecord
from finchtune.errors import UserError

LETTERS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
VOCAB_SIZE = 1000


def documents_in(body: bytes, index: bytes) -> list[list[int]]:
    """What a pair holds, taken apart with struct; raises AssertionError if it is not sound."""
    magic, version, code, n, m = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    assert len(index) == 34 + 12 * n + 8 * m
    sizes = struct.unpack_from(f"<{n}i", index, 34)
    starts = struct.unpack_from(f"<{n}q", index, 34 + 4 * n)
    bounds = struct.unpack_from(f"<{m}q", index, 34 + 12 * n)
    assert bounds[0] == 0
    assert bounds[-1] == n
    assert list(bounds) == sorted(bounds)
    width = struct.calcsize(LETTERS[code])
    documents, position = [], 0
    for size, start in zip(sizes, starts, strict=True):
        assert size >= 0
        assert start == position
        position += size * width
        documents.append(list(struct.unpack_from(f"<{size}{LETTERS[code]}", body, start)))
    assert position == len(body)
    return documents


def check_pair(body: bytes, index: bytes, folder: Path) -> bool:
    """The pair is refused with a UserError, or read as `documents_in` reads it; whether read."""
    (folder / "data.bin").write_bytes(body)
    (folder / "data.idx").write_bytes(index)
    try:
        pair = BinIdx(folder / "data")
        pair.check_tokens(VOCAB_SIZE)
    except UserError:
        return False
    found = [pair.doc(i).tolist() for i in range(len(pair))]
    assert found == documents_in(body, index)
    assert all(0 <= id < VOCAB_SIZE for document in found for id in document)
    return True


def check_line(line: bytes) -> bool:
    """The line is a BadRecord, or has the value that `json` gives it and no key twice."""
    try:
        value = parse_line(line)
    except BadRecord:
        return False
    pairs: list[list] = []
    assert value == json.loads(line, object_pairs_hook=lambda p: pairs.append(p) or dict(p))
    assert all(len(dict(p)) == len(p) for p in pairs)
    return True


def main() -> None:
    import atheris

    for function in (BinIdx.__init__, BinIdx.check_tokens, _read_index, _parse_flat):
        atheris.instrument_func(function)
    folder = Path(tempfile.mkdtemp())

    def run(raw: bytes) -> None:
        length = raw[0] if raw else 0
        check_pair(raw[1 : 1 + length], raw[1 + length :], folder)
        check_line(raw)

    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
