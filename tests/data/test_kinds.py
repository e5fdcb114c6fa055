"""JSON arrays, tables and compressed files: what is read of them, and what is too much."""

import gzip
import json
import random
import subprocess
import sys
import tracemalloc

import pytest

from finchtune.data import compressed, inputs
from finchtune.data.compressed import BLOCK_BYTES
from finchtune.data.inputs import read_blocks
from finchtune.errors import UserError


def records_of(path) -> list:
    return [record for block in read_blocks(path, "text") for _, record in block.records()]


def write(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_its_elements(tmp_path, indent):
    rows = [{"text": "a", "n": [1, {"x": "}],["}]}, {"text": 'q"\\', "m": {}}, {"text": "三\n"}]
    for name in ("a.json", "a.jsonl"):
        path = write(tmp_path / name, json.dumps(rows, indent=indent).encode())
        assert records_of(path) == rows


def test_an_array_with_a_bom_and_blanks_is_one(tmp_path):
    path = write(tmp_path / "a.json", b'\xef\xbb\xbf \n[ {"text": "a"} , {"text": "b"} ]\n\n')
    assert records_of(path) == [{"text": "a"}, {"text": "b"}]


def test_elements_may_lie_across_blocks(tmp_path):
    drawn = random.Random(1)
    alphabet = '"\\[]{},: ab三\n'
    sizes = [*(drawn.randrange(40_000) for _ in range(60)), 2 * BLOCK_BYTES, 5]
    rows = [{"text": "".join(drawn.choices(alphabet, k=size))} for size in sizes]
    raw = json.dumps(rows, indent=1).encode()
    assert len(raw) > 4 * BLOCK_BYTES
    blocks = list(read_blocks(write(tmp_path / "a.json", raw), "text"))
    assert len(blocks) > 2
    found = [pair for block in blocks for pair in block.records()]
    assert [record for _, record in found] == rows
    assert [where for where, _ in found][-1].endswith(f"a.json:{len(rows)}")
    assert sum(block.read_bytes for block in blocks) == len(raw)


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_a_table_has_a_record_per_row(tmp_path, name, mark):
    text = f'question{mark}answer\r\n1+1?{mark}2\r\n\r\n"a{mark}""b""\nc"{mark}ä\r\n'
    raw = b"\xef\xbb\xbf" + text.encode()
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith(".gz") else raw)
    assert records_of(path) == [
        {"question": "1+1?", "answer": "2"},
        {"question": f'a{mark}"b"\nc', "answer": "ä"},
    ]


def test_a_long_table_is_read_in_blocks(tmp_path):
    rows = [f"{i},{'x' * 300}" for i in range(5000)]
    path = write(tmp_path / "a.csv", "\n".join(["n,text", *rows]).encode())
    blocks = list(read_blocks(path, "text"))
    assert len(blocks) > 2
    assert sum(block.read_bytes for block in blocks) == path.stat().st_size
    found = [pair for block in blocks for pair in block.records()]
    assert [record["n"] for _, record in found] == [str(i) for i in range(5000)]
    assert found[-1][0].endswith("a.csv:5001")


@pytest.mark.parametrize("content", [b'{"text": "%s"}', b'[{"text": "%s"}]'])
def test_a_record_beyond_the_limit_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr(inputs, "MAX_RECORD", 2 * BLOCK_BYTES)
    raw = content % (b"x" * 4 * BLOCK_BYTES)
    path = write(tmp_path / "a.json", raw if raw[:1] == b"[" else b'{"text": "a"}\n' + raw)
    with pytest.raises(UserError, match=r"a\.json.*longer than 2,097,152 bytes; split it"):
        records_of(path)


def bomb_of(kind: str) -> bytes:
    """Many zeros, in little."""
    if kind == "gz":
        return gzip.compress(bytes(30 << 20), 9)
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor(level=1).compress(bytes(300 << 20))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_little_does_not_unfold_to_very_much(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(compressed, "ALWAYS_ALLOWED", 16 << 20)
    path = write(tmp_path / f"a.txt.{kind}", bomb_of(kind))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="unfolds to more than 250 times its size"):
            list(read_blocks(path, "text"))
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_text_that_repeats_itself_may_become_small(tmp_path):
    line = json.dumps({"text": "the same again " * 20}).encode() + b"\n"
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(line * 100_000))
    assert path.stat().st_size * 100 < len(line) * 100_000
    assert len(records_of(path)) == 100_000


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
@pytest.mark.parametrize("fields", [("text",), ("question", "answer")])
def test_one_long_record_takes_at_most_four_times_its_size(tmp_path, tokenizer, fields):
    """Peak resident memory of prepare_data.py, above that for a short record."""

    def peak(size: int) -> int:
        text = "".join(random.Random(1).choices("今天天气很好, and more words. ", k=1 << 20)) * size
        record = dict.fromkeys(fields, "q") | {fields[-1]: text or "a"}
        path = tmp_path / f"{size}.jsonl"
        path.write_text(json.dumps(record, ensure_ascii=False))
        words = ["--input", path, "--output", tmp_path / "out", "--tokenizer", tokenizer]
        words += ["--workers", 2, "--overwrite", *(["--sft_field", *fields] if fields[1:] else [])]
        code = (
            "import resource, sys; from finchtune.cli.prepare import main; main(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
        )
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    size = 20
    above = peak(size) - peak(0)
    assert above < 4.2 * (tmp_path / f"{size}.jsonl").stat().st_size
