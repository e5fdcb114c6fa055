"""The .bin/.idx format against an independent writer, and every way in which a pair can be bad."""

import os
import struct
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finchtune.data.binidx import HEADER, BinIdx, BinIdxWriter, token_dtype
from finchtune.errors import UserError

DOCUMENTS = [[5, 6, 7], [], [65535, 0], [1]]
SIZES, STARTS, DOC_IDX = HEADER.size, HEADER.size + 16, HEADER.size + 48


def reference_pair(documents, code, letter) -> tuple[bytes, bytes]:
    """.bin and .idx, written field by field with struct."""
    width = struct.calcsize(letter)
    n = len(documents)
    body = b"".join(struct.pack(f"<{len(d)}{letter}", *d) for d in documents)
    starts = [0, *accumulate(len(d) * width for d in documents)][:n]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, n, n + 1)
    index += struct.pack(f"<{n}i", *map(len, documents))
    index += struct.pack(f"<{n}q", *starts)
    index += struct.pack(f"<{n + 1}q", *range(n + 1))
    return body, index


def write(prefix, documents, dtype="<u2"):
    with BinIdxWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)


def read_pair(prefix) -> tuple[bytes, bytes]:
    return tuple(Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx"))


@pytest.fixture
def pair(tmp_path):
    """A good data set of DOCUMENTS in uint16, as its prefix."""
    prefix = str(tmp_path / "data")
    write(prefix, DOCUMENTS)
    return prefix


def patch(path, offset, raw):
    """Overwrite bytes of a file; a negative offset counts from its end."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(raw)


@pytest.mark.parametrize(("dtype", "code", "letter"), [("<u2", 8, "H"), ("<i4", 4, "i")])
@pytest.mark.parametrize("documents", [DOCUMENTS, [[3]], []])
def test_written_files_equal_the_reference_byte_for_byte(tmp_path, dtype, code, letter, documents):
    write(tmp_path / "data", documents, dtype)
    assert read_pair(tmp_path / "data") == reference_pair(documents, code, letter)


@pytest.mark.parametrize("code_letter", [(1, "B"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_every_integer_dtype_is_read(tmp_path, code_letter):
    documents = [[1, 2], [], [100]]
    for suffix, raw in zip((".bin", ".idx"), reference_pair(documents, *code_letter), strict=True):
        (tmp_path / f"data{suffix}").write_bytes(raw)
    data = BinIdx(tmp_path / "data")
    assert [data.doc(i).tolist() for i in range(len(data))] == documents
    assert data.n_tokens == 3


@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=8), wide=st.booleans()
)
@settings(max_examples=50)
def test_what_is_written_is_read(tmp_path_factory, documents, wide):
    prefix = tmp_path_factory.mktemp("round") / "data"
    write(prefix, documents, "<i4" if wide else "<u2")
    data = BinIdx(prefix)
    assert [data.doc(i).tolist() for i in range(len(data))] == documents
    assert data.sizes.tolist() == [len(d) for d in documents]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_the_prefix_may_carry_an_extension(pair, suffix):
    assert len(BinIdx(pair + suffix)) == len(DOCUMENTS)


def test_the_narrowest_dtype_is_chosen():
    assert [token_dtype(n) for n in (256, 65536, 65537)] == [np.uint16, np.uint16, np.int32]


def fail_while_writing(prefix):
    with BinIdxWriter(prefix, "<u2") as writer:
        writer.add([9, 9, 9])
        raise RuntimeError


def test_a_failure_leaves_nothing_new_and_keeps_the_old(tmp_path, pair):
    before = read_pair(pair)
    with pytest.raises(RuntimeError):
        fail_while_writing(pair)
    assert read_pair(pair) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(UserError, match=r"cannot write .*data\.bin: File too large"),
            BinIdxWriter(tmp_path / "data", "<u2") as writer,
        ):
            writer.add(np.zeros(100_000, np.uint16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_told(tmp_path):
    (tmp_path / "data.bin").mkdir()
    with pytest.raises(UserError, match=r"data\.bin is a folder"):
        write(tmp_path / "data", DOCUMENTS)


def test_token_ids_are_checked_with_document_and_position(tmp_path):
    write(tmp_path / "data", [[1], [], [2, 3, 300, 4]], "<i4")
    data = BinIdx(tmp_path / "data")
    data.check_tokens(301)
    message = (
        r"data\.bin: document 2, position 2: token id 300 is not below the vocabulary size 300"
    )
    with pytest.raises(UserError, match=message):
        data.check_tokens(300)
    write(tmp_path / "data", [[1], [2, -7]], "<i4")
    with pytest.raises(UserError, match="document 1, position 1: token id -7"):
        BinIdx(tmp_path / "data").check_tokens(300)


# Each entry damages the good pair of DOCUMENTS: which file, how, and what the reader says of it.
DAMAGES = {
    "no idx": (".idx", os.unlink, "No such file or directory"),
    "no bin": (".bin", os.unlink, "No such file or directory"),
    "empty idx": (".idx", lambda p: os.truncate(p, 0), "0 bytes, too short for the header"),
    "half a header": (".idx", lambda p: os.truncate(p, 20), "20 bytes, too short for the header"),
    "idx cut short": (".idx", lambda p: os.truncate(p, 60), "60 bytes, but its header of 4 docu"),
    "idx too long": (".idx", lambda p: os.truncate(p, 200), "the file is truncated or damaged"),
    "bin cut short": (".bin", lambda p: os.truncate(p, 10), "10 bytes, but its .idx describes 6"),
    "empty bin": (".bin", lambda p: os.truncate(p, 0), "0 bytes, but its .idx describes 6 tokens"),
    "bin too long": (".bin", lambda p: os.truncate(p, 14), "14 bytes, but its .idx describes 6"),
    "other magic": (".idx", lambda p: patch(p, 0, b"TNTIDX"), "this is no .idx file"),
    "other version": (".idx", lambda p: patch(p, 9, b"\2"), "version 2, but only version 1"),
    "dtype 0": (".idx", lambda p: patch(p, 17, b"\0"), "dtype code 0 is not one of the integer"),
    "dtype float": (".idx", lambda p: patch(p, 17, b"\6"), "dtype code 6 is not one of the integ"),
    "dtype 255": (".idx", lambda p: patch(p, 17, b"\xff"), "dtype code 255 is not one of the in"),
    "wider dtype": (".idx", lambda p: patch(p, 17, b"\4"), "document 1 starts at byte 6, but the"),
    "huge count": (".idx", lambda p: patch(p, 18, b"\xff" * 8), "header of 18446744073709551615"),
    "negative size": (
        ".idx",
        lambda p: patch(p, SIZES + 8, struct.pack("<i", -2)),
        "document 2 has the negative size -2",
    ),
    "size too large": (
        ".idx",
        lambda p: patch(p, SIZES, struct.pack("<i", 4)),
        "document 1 starts at byte 6, but the documents before it end at byte 8",
    ),
    "last size too large": (
        ".idx",
        lambda p: patch(p, SIZES + 12, struct.pack("<i", 2)),
        "12 bytes, but its .idx describes 7 tokens",
    ),
    "overlapping documents": (
        ".idx",
        lambda p: patch(p, STARTS + 16, struct.pack("<q", 4)),
        "document 2 starts at byte 4, but the documents before it end at byte 6",
    ),
    "gap before a document": (
        ".idx",
        lambda p: patch(p, STARTS + 24, struct.pack("<q", 12)),
        "document 3 starts at byte 12, but the documents before it end at byte 10",
    ),
    "start before the file": (
        ".idx",
        lambda p: patch(p, STARTS, struct.pack("<q", -2)),
        "document 0 starts at byte -2",
    ),
    "boundaries fall": (
        ".idx",
        lambda p: patch(p, DOC_IDX + 8, struct.pack("<q", 3)),
        "the document boundaries do not rise from 0 to 4",
    ),
    "boundaries end early": (
        ".idx",
        lambda p: patch(p, -8, struct.pack("<q", 3)),
        "the document boundaries do not rise from 0 to 4",
    ),
    "bin is a folder": (
        ".bin",
        lambda p: (os.unlink(p), os.mkdir(p)),
        "not a regular file",
    ),
    "idx is a pipe": (".idx", lambda p: (os.unlink(p), os.mkfifo(p)), "not a regular file"),
    "dangling link": (
        ".idx",
        lambda p: (os.unlink(p), os.symlink("nowhere", p)),
        "No such file or directory",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_pair_is_refused_in_one_line_naming_the_file(pair, name):
    suffix, damage, message = DAMAGES[name]
    damage(pair + suffix)
    with pytest.raises(UserError) as error:
        BinIdx(pair)
    assert message in str(error.value)
    assert "data.idx" in str(error.value) or "data.bin" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_forgotten_text_document_is_suggested(tmp_path):
    write(tmp_path / "corpus_text_document", DOCUMENTS)
    with pytest.raises(UserError, match=r"did you mean .*corpus_text_document"):
        BinIdx(tmp_path / "corpus")
