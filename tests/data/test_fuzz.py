"""Whatever bytes the readers are given: a message, or the right data."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import fuzz_reader
from helpers.fuzz_reader import check_line, check_pair
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finchtune.data.binidx import HEADER, BinIdxWriter

keys = st.sampled_from(["text", "a", "b"])
scalars = st.sampled_from(
    ['"t"', '"\\""', '"\\":"', "1", "1e400", "NaN", "null", "[1]", "{}", '""']
)
spaces = st.sampled_from(["", " ", "\t", "\r"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def good_pair(folder: Path) -> tuple[bytes, bytes]:
    with BinIdxWriter(folder / "good", "<u2") as writer:
        for document in ([5, 6, 7], [], [999, 0], [1]):
            writer.add(document)
    return tuple((folder / f"good{suffix}").read_bytes() for suffix in (".bin", ".idx"))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_pair_is_refused_or_read_right(folder, data):
    files = [bytearray(raw) for raw in good_pair(folder)]
    assert check_pair(*map(bytes, files), folder)
    for _ in range(data.draw(st.integers(1, 4))):
        raw = data.draw(st.sampled_from(files))
        change = data.draw(st.sampled_from(["byte", "word", "cut", "grow"]))
        at = data.draw(st.integers(0, len(raw)))
        if change == "byte":
            raw[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
        elif change == "word":
            raw[at : at + 8] = struct.pack("<q", data.draw(st.integers(-(2**63), 2**63 - 1)))
        elif change == "cut":
            del raw[at:]
        else:
            raw[at:at] = data.draw(st.binary(max_size=9))
    check_pair(*map(bytes, files), folder)


@given(
    code=st.integers(0, 9),
    sizes=st.lists(st.integers(-1, 3), max_size=4),
    extra=st.integers(-1, 1),
    body=st.binary(max_size=24),
)
@settings(max_examples=150, deadline=None)
def test_a_made_up_pair_is_refused_or_read_right(folder, code, sizes, extra, body):
    n, m = len(sizes), max(len(sizes) + 1 + extra, 0)
    index = HEADER.pack(b"MMIDIDX\0\0", 1, code, n, m) + struct.pack(f"<{n}i", *sizes)
    index += struct.pack(f"<{n}q", *(2 * sum(sizes[:i]) for i in range(n)))
    check_pair(body, index + struct.pack(f"<{m}q", *range(m)), folder)


@given(st.lists(st.tuples(spaces, keys, spaces, scalars), max_size=4))
@example([("", "a", "", "1"), ("", "a", " ", "2")])
@example([("", "a", "", '"\\\\"'), ("", "a", "", '"\\""')])
@settings(max_examples=300)
def test_a_line_is_refused_or_read_as_json_reads_it(members):
    line = ",".join(f'{before}"{key}"{after}:{value}' for before, key, after, value in members)
    check_line(("{" + line + "}").encode())


@given(st.binary(max_size=40))
def test_any_bytes_are_refused_or_read_as_json_reads_them(raw):
    check_line(raw)
    check_line(b'{"text": "' + raw + b'"}')


@pytest.mark.slow
def test_coverage_guided_fuzzing_finds_nothing(tmp_path):
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
    for i, (body, index) in enumerate([good_pair(tmp_path), (b"", b"")]):
        (tmp_path / f"seed{i}").write_bytes(bytes([len(body)]) + body + index)
    done = subprocess.run(
        [sys.executable, fuzz_reader.__file__, "-runs=5000", str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
