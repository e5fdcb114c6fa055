"""Bad files, each with the one line that a person gets to read. Damaged .bin/.idx pairs have
their table in test_binidx.py."""

import gzip
import json
import os
import zlib

import pytest

from finchtune.data import load_data
from finchtune.data.prepare import prepare
from finchtune.data.render import Layout
from finchtune.data.workers import Recipe
from finchtune.errors import UserError
from finchtune.tokenizer import BytesTokenizer

GOOD = b'{"text": "good"}\n'
COMPRESSED = gzip.compress(GOOD * 1000)

# name -> (the file's name, its content, the message).
FILES = {
    "not JSON": ("a.jsonl", b"text\n", "a.jsonl:1: not JSON: Expecting value at column 1"),
    "second line": ("a.jsonl", GOOD + b"{\n", "a.jsonl:2: not JSON: Expecting property name"),
    "cut line": ("a.jsonl", GOOD + b'{"text": "ab', "a.jsonl:2: not JSON: Unterminated string"),
    "two on a line": ("a.jsonl", b'{"text": "a"} {"text": "b"}', "a.jsonl:1: not JSON: Extra data"),
    "single quotes": ("a.jsonl", b"{'text': 'a'}", "a.jsonl:1: not JSON: Expecting property name"),
    "trailing comma": ("a.jsonl", b'{"text": "a",}', "a.jsonl:1: not JSON: "),
    "blank lines count": ("a.jsonl", b"\n \n\n{\n", "a.jsonl:4: not JSON"),
    "control character": ("a.jsonl", b'{"text": "a\x01"}', "not JSON: Invalid control character"),
    "NUL bytes": ("a.jsonl", b"\0\0\0\0", "a.jsonl:1: not JSON: Expecting value at column 1"),
    "bad escape": ("a.jsonl", b'{"text": "\\x41"}', "not JSON: Invalid \\escape"),
    "bad \\u escape": ("a.jsonl", b'{"text": "\\u12g4"}', "not JSON: Invalid \\uXXXX escape"),
    "a list": ("a.jsonl", GOOD + b'["a"]', "a.jsonl:2: a JSON object is needed, but this is a li"),
    "a string": ("a.jsonl", b'"text"', "a.jsonl:1: a JSON object is needed, but this is a string"),
    "null": ("a.jsonl", b"null", "a.jsonl:1: a JSON object is needed, but this is null"),
    "other field": ("a.jsonl", b'{"txt": "a"}', "there is no field 'text'; the fields are 'txt'"),
    "many fields": (
        "a.jsonl",
        json.dumps({f"k{i}": i for i in range(99)}).encode(),
        "there is no field 'text'; the fields are 'k0', 'k1', 'k2', 'k3', 'k4', 'k5', 'k6', 'k7'",
    ),
    "a list as text": (
        "a.jsonl",
        b'{"text": ["b"]}',
        "it is a list; choose one of its values, or jo",
    ),
    "alpaca": (
        "a.jsonl",
        b'{"instruction": "a", "output": "b"}',
        "no field 'text', but those of `sft_field` instruction input output",
    ),
    "an object": ("a.jsonl", b'{"text": {}}', "'text' must be a string, but it is an object"),
    "repeated key": ("a.jsonl", b'{"text": "a", "text": "b"}', "the key 'text' stands twice"),
    "repeated key made up for by quotes written as numbers": (
        "a.jsonl",
        rb'{"text": "b", "text": "a\u0022\u0022\u0022\u0022"}',
        "the key 'text' stands twice",
    ),
    "repeated inner key": (
        "a.jsonl",
        b'{"text": "a", "x": [{"k": 1, "k": 2}]}',
        "a.jsonl:1: the key 'k' stands twice in one object",
    ),
    "NaN": ("a.jsonl", b'{"text": "a", "score": NaN}', "a.jsonl:1: NaN is not JSON"),
    "Infinity": ("a.jsonl", b'{"text": "a", "score": -Infinity}', "-Infinity is not JSON"),
    "5000 digits": (
        "a.jsonl",
        b'{"text": "a", "n": ' + b"7" * 5000 + b"}",
        "a.jsonl:1: a number has more digits than Python reads",
    ),
    "nested lists": (
        "a.jsonl",
        b'{"text": ' + b"[" * 100_000,
        "a.jsonl:1: nested more than 200 levels deep",
    ),
    "nested objects": (
        "a.jsonl",
        b'{"text": ' * 100_000,
        "a.jsonl:1: nested more than 200 levels deep",
    ),
    "lone surrogate": (
        "a.jsonl",
        b'{"text": "ab\\ud83d"}',
        "a.jsonl:1: the text holds a lone surrogate at character 2",
    ),
    "low surrogate": ("a.jsonl", b'{"text": "\\udc00"}', "lone surrogate at character 0"),
    "encoded surrogate": (
        "a.jsonl",
        b'{"text": "\xed\xa0\x80"}',
        "a.jsonl:1: byte 0xed at column 11 is not UTF-8",
    ),
    "Latin-1": ("a.jsonl", b'{"text": "na\xefve"}', "byte 0xef at column 13 is not UTF-8"),
    "overlong": ("a.jsonl", b'{"text": "\xc0\x80"}', "byte 0xc0 at column 11 is not UTF-8"),
    "UTF-16": (
        "a.jsonl",
        GOOD.decode().encode("utf-16"),
        "; it looks like UTF-16: iconv -f UTF-16 -t",
    ),
    "UTF-16 without a mark": (
        "a.jsonl",
        GOOD.decode().encode("utf-16-le") * 3,
        "; it looks like UTF-16LE: iconv -f UTF-16LE -t UTF-8 ",
    ),
    "GBK": (
        "a.jsonl",
        '{"text": "中文数据"}\n'.encode("gbk") * 3,
        " is not UTF-8; it looks like GB18030: iconv -f GB18030 -t UTF-8 '",
    ),
    "Shift JIS": (
        "a.txt",
        "こんにちは、元気ですか".encode("cp932"),
        "is not UTF-8; it looks like CP932",
    ),
    "Cyrillic": (
        "a.txt",
        "Привет, как дела".encode("cp1251"),
        "it looks like CP1251: iconv -f CP1251",
    ),
    "two BOMs": (
        "a.jsonl",
        b"\xef\xbb\xbf" * 2 + GOOD,
        "a.jsonl:1: not JSON: Expecting value",
    ),
    "BOM within": ("a.jsonl", GOOD + b"\xef\xbb\xbf" + GOOD, "a.jsonl:2: not JSON"),
    "array with a bad element": (
        "a.json",
        b'[{"text": "a"},\n3]',
        "a.json:2: a JSON object is nee",
    ),
    "array with a gap": ("a.json", b'[{"text": "a"},, {"text": "b"}]', "a.json:2: not JSON"),
    "array with a last comma": ("a.json", b'[{"text": "a"},]', "a.json:2: not JSON"),
    "cut array": ("a.json", b'[{"text": "a"}, {"text": "b', "a.json: the array has no end"),
    "array and more": (
        "a.json",
        b'[{"text": "a"}] {"text": "b"}',
        "a.json: the array does not end",
    ),
    "array closed as an object": ("a.json", b'[{"text": "a"}}', "a.json: the array does not end"),
    "empty array": ("a.json", b"[ ]", "a.json: there are no documents in it"),
    "array with braces crossed": ("a.json", b'[{"text": "a"]]', "a.json:1: not JSON"),
    "table without names": (
        "a.csv",
        b"text,text\na,b\n",
        "a.csv:1: the first line must hold the n",
    ),
    "empty table": ("a.tsv", b"", "a.tsv:1: the first line must hold the names"),
    "table with more cells": ("a.csv", b"text,b\na,b,c\n", "a.csv:2: 3 cells, but 2 columns"),
    "table with an open quote": ("a.csv", b'text,b\n"a,b\n', "a.csv:2: not a readable table: unex"),
    "table in Latin-1": (
        "a.csv",
        b"text\nna\xefve\n" * 3,
        "a.csv: the table is not UTF-8; it looks like CP1252",
    ),
    "empty": ("a.jsonl", b"", "a.jsonl: there are no documents in it"),
    "blank": ("a.jsonl", b"\n  \r\n\t", "a.jsonl: there are no documents in it"),
    "empty texts": ("a.jsonl", b'{"text": ""}\n' * 3, "a.jsonl: there are no documents in it"),
    "empty text file": ("a.txt", b"", "a.txt: there are no documents in it"),
    "Latin-1 text": ("a.txt", b"na\xefve", "a.txt:1: byte 0xef at 2 is not UTF-8"),
    "unknown kind": ("a.doc", b"text\na\n", "a.doc: unknown kind of file; known are .jsonl"),
    "no suffix": ("data", GOOD, "data: unknown kind of file"),
    "gz of unknown": ("a.tar.gz", COMPRESSED, "a.tar.gz: unknown kind of file"),
    "not gz": ("a.jsonl.gz", GOOD, "a.jsonl.gz: Not a gzipped file"),
    "cut gz": ("a.jsonl.gz", COMPRESSED[:-20], "a.jsonl.gz: Compressed file ended before"),
    "damaged gz": (
        "a.jsonl.gz",
        COMPRESSED[:12] + b"\xff" * 8 + COMPRESSED[20:],
        "a.jsonl.gz: Error -3 while decompressing data",
    ),
    "gz of another sum": (
        "a.jsonl.gz",
        COMPRESSED[:-8] + (zlib.crc32(GOOD) ^ 1).to_bytes(4, "little") + COMPRESSED[-4:],
        "a.jsonl.gz: CRC check failed",
    ),
    "bad line in gz": ("a.jsonl.gz", gzip.compress(GOOD + b"{"), "a.jsonl.gz:2: not JSON"),
}
RECIPE = Recipe(Layout(), "bytes", "<u2")


def message_of(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def load(path):
    return load_data(str(path), "jsonl", "pad", 8, tokenizer=BytesTokenizer(), vocab_size=256)


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_told_in_one_line(tmp_path, name):
    file, content, message = FILES[name]
    path = tmp_path / file
    path.write_bytes(content)
    told = message_of(prepare, [str(path)], str(tmp_path / "out"), RECIPE)
    assert message in told
    assert str(path) in told
    assert len(told) < 500
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert message in message_of(load, path)


@pytest.mark.parametrize("name", [n for n, (_, _, m) in FILES.items() if ".jsonl:1: " in m])
def test_a_bad_line_can_be_skipped(tmp_path, name):
    file, content, _ = FILES[name]
    (tmp_path / file).write_bytes(content.rstrip() + b"\n" + GOOD)
    recipe = Recipe(Layout(), "bytes", "<u2", on_bad="skip")
    totals = prepare([str(tmp_path / file)], str(tmp_path / "out"), recipe)
    assert (totals.documents, totals.skipped) == (1, 1)


def test_brackets_in_a_text_are_no_nesting(tmp_path):
    text = '"[' * 500 + "\\" + "{" * 500
    inner = b"[" * 150 + b"]" * 150
    (tmp_path / "a.jsonl").write_bytes(
        json.dumps({"text": text}).encode()[:-1] + b', "x": ' + inner + b"}"
    )
    assert load(tmp_path / "a.jsonl").n_tokens == len(text) + 1


def unreadable(path):
    path.write_bytes(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


PLACES = {
    "nothing there": (lambda path: None, "a.jsonl: no such file"),
    "folder without data": (os.mkdir, "a.jsonl: no data files in this folder"),
    "pipe": (os.mkfifo, "a.jsonl: not a regular file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "a.jsonl: no such file"),
    "link to itself": (lambda path: path.symlink_to(path), "a.jsonl: no such file"),
    "unreadable": (unreadable, "a.jsonl: Permission denied"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_readable_file_is_told(tmp_path, name):
    make, message = PLACES[name]
    path = tmp_path / "a.jsonl"
    make(path)
    assert message in message_of(prepare, [str(path)], str(tmp_path / "out"), RECIPE)
    assert message in message_of(load, path)


@pytest.mark.parametrize("name", ["with space.jsonl", "[1]*?.jsonl", "ümläut.jsonl", "-x.jsonl"])
def test_odd_names_are_names(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "sub").mkdir()
    twisted = tmp_path / "sub" / ".." / name
    for path in (tmp_path / name, twisted):
        prepare([str(path)], str(tmp_path / "sub" / ".." / f"out {name}"), RECIPE)
        assert load(path).n_tokens == 5
        assert load_data(str(tmp_path / f"out {name}"), "binidx", "pad", 8).n_tokens == 5


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    assert load(tmp_path / "b.jsonl").n_tokens == 5


@pytest.mark.parametrize(
    ("module", "file"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")]
)
def test_a_missing_library_is_named(tmp_path, monkeypatch, module, file):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / file).write_bytes(b"x")
    told = message_of(prepare, [str(tmp_path / file)], str(tmp_path / "out"), RECIPE)
    assert f"needs `pip install {module}`" in told


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_cut_zst_is_told(tmp_path, cut):
    zstandard = pytest.importorskip("zstandard")
    raw = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD * 1000)
    (tmp_path / "a.jsonl.zst").write_bytes(raw[:-cut])
    told = message_of(prepare, [str(tmp_path / "a.jsonl.zst")], str(tmp_path / "out"), RECIPE)
    assert "a.jsonl.zst: the file ends inside a compressed frame" in told


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 100])
def test_a_damaged_parquet_is_told(tmp_path, content):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(content)
    told = message_of(prepare, [str(tmp_path / "a.parquet")], str(tmp_path / "out"), RECIPE)
    assert "a.parquet: not a readable .parquet" in told


def test_a_parquet_whose_text_is_no_utf_8_is_told(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    place = pyarrow.py_buffer((0).to_bytes(4, "little") + (1).to_bytes(4, "little"))
    text = pyarrow.StringArray.from_buffers(1, place, pyarrow.py_buffer(b"\xff"))
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    told = message_of(prepare, [str(tmp_path / "a.parquet")], str(tmp_path / "out"), RECIPE)
    assert "a.parquet: not a readable .parquet" in told
