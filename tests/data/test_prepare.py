"""From files of every kind to .bin/.idx pairs, by any number of processes."""

import gzip
import json
import multiprocessing
import os
import struct
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from finchtune.data import load_data
from finchtune.data.binidx import BinIdx
from finchtune.data.compressed import BLOCK_BYTES
from finchtune.data.documents import is_held_out
from finchtune.data.inputs import find_inputs, read_blocks
from finchtune.data.prepare import prepare
from finchtune.data.render import Layout
from finchtune.data.workers import Recipe
from finchtune.errors import UserError
from finchtune.tokenizer import BytesTokenizer, load_tokenizer

BYTES = Recipe(Layout(), "bytes", "<u2")
PAIR = ["a.jsonl", "out.bin", "out.idx", "out.info.json"]
TEXTS = ["First.", "", "Zweitens: ä\n\nzwei Zeilen", "三"]


def write_jsonl(path: Path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts_of(prefix) -> list[str]:
    """The texts of a data set of bytes, each with its end of document."""
    data = BinIdx(prefix)
    return [bytes(data.doc(i).tolist()).decode() for i in range(len(data))]


def ended(texts) -> list[str]:
    return [text + "\0" for text in texts if text]


def test_lines_become_documents_that_end(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    totals = prepare([source], tmp_path / "out", BYTES)
    assert texts_of(tmp_path / "out") == ended(TEXTS)
    assert (totals.documents, totals.tokens) == (3, BinIdx(tmp_path / "out").n_tokens)
    assert totals.read_bytes == os.path.getsize(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == PAIR


def test_documents_need_not_end(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare([source], str(tmp_path / "out"), replace(BYTES, end=False))
    assert texts_of(tmp_path / "out") == [text for text in TEXTS if text]


def test_several_processes_and_blocks_keep_the_order(tmp_path):
    texts = [f"{i} " + "x" * (1 + i * 37 % 4000) for i in range(4000)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    assert os.path.getsize(source) > 7 * BLOCK_BYTES
    seen = []
    prepare([source], str(tmp_path / "out"), BYTES, 2, lambda totals: seen.append(totals.documents))
    assert texts_of(tmp_path / "out") == ended(texts)
    assert len(seen) >= 4
    assert seen == sorted(seen)


def test_a_killed_worker_is_told_and_nothing_is_left(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * 1000] * 9000)

    def kill(totals):
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(UserError, match="a worker process died with exit code -9"):
        prepare([source], str(tmp_path / "out"), BYTES, 2, kill)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_bad_record_in_a_late_block_is_named_by_its_line(tmp_path):
    lines = [json.dumps({"text": "x" * 1000})] * 3000 + ['{"text": [1]}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl:3001: the field 'text' must be a string"):
        prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), BYTES, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_records_can_be_skipped_and_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n[]\n{"text": "b"}\n{}\n')
    totals = prepare(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "out"), replace(BYTES, on_bad="skip")
    )
    assert texts_of(tmp_path / "out") == ended("ab")
    assert totals.skipped == 2
    assert "a.jsonl:2: a JSON object is needed" in totals.first_bad


def test_masks_are_written_where_parts_are_masked_and_loaded(tmp_path):
    rows = [{"question": "q" * i, "answer": "answer"} for i in range(1, 4)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    layout = Layout(("question", "answer"))
    totals = prepare(
        [str(tmp_path / "qa.jsonl")], str(tmp_path / "qa"), replace(BYTES, layout=layout)
    )
    mask = BinIdx(tmp_path / "qa.mask")
    assert mask.dtype == np.uint8
    assert [mask.doc(i).sum() for i in range(3)] == [7, 7, 7]
    assert totals.tokens - totals.masked_tokens == 21
    arguments = ("pad", 300, "qa")
    direct = load_data(
        str(tmp_path / "qa.jsonl"), "sft", *arguments, ["question", "answer"], BytesTokenizer(), 256
    )
    prepared = load_data(str(tmp_path / "qa"), "binidx", *arguments, vocab_size=256)
    ours, theirs = (data.rows(0, 0, 1, 3, 1)[0] for data in (direct, prepared))
    assert ours.tokens.equal(theirs.tokens)
    assert ours.labels.equal(theirs.labels)


def test_the_end_after_an_unanswered_turn_is_not_trained_on(tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    prepare([str(tmp_path / "chat.jsonl")], str(tmp_path / "out"), BYTES)
    trained = BinIdx(tmp_path / "out.mask").tokens
    assert bytes(BinIdx(tmp_path / "out").tokens[trained == 1].tolist()) == b" b\n\n"


def test_an_old_mask_does_not_outlive_its_data(tmp_path):
    for name in ("out.mask.bin", "out.mask.idx"):
        (tmp_path / name).write_text("old")
    prepare([write_jsonl(tmp_path / "a.jsonl", TEXTS)], str(tmp_path / "out"), BYTES)
    assert sorted(path.name for path in tmp_path.iterdir()) == PAIR


def test_the_validation_split_is_a_partition_that_depends_on_the_text_alone(tmp_path):
    texts = [f"document {i}" for i in range(400)]
    recipe = replace(BYTES, val_split=0.25)
    prepare([write_jsonl(tmp_path / "a.jsonl", texts)], str(tmp_path / "a"), recipe)
    prepare([write_jsonl(tmp_path / "b.jsonl", texts[::-1])], str(tmp_path / "b"), recipe)
    train, val = texts_of(tmp_path / "a"), texts_of(tmp_path / "a_val")
    assert sorted(train + val) == sorted(ended(texts))
    assert texts_of(tmp_path / "b_val") == val[::-1]
    assert 60 < len(val) < 140


def test_a_held_out_document_stays_so_in_a_larger_fraction_and_another_dtype():
    documents = [np.array([i, i + 1], "<u2") for i in range(300)]
    small = [is_held_out(ids, 0.1) for ids in documents]
    large = [is_held_out(ids.astype("<i4"), 0.3) for ids in documents]
    assert all(b for a, b in zip(small, large, strict=True) if a)
    assert sum(large) > sum(small) > 0


def test_an_empty_split_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(UserError, match="choose another `val_split`"):
        prepare([source], str(tmp_path / "out"), replace(BYTES, val_split=1e-9))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def store_gz(path, raw):
    path.with_name("a.jsonl.gz").write_bytes(gzip.compress(raw))


def store_zst(path, raw):
    zstandard = pytest.importorskip("zstandard")
    half = len(raw) // 2
    frames = [zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:])]
    path.with_name("a.jsonl.zst").write_bytes(b"".join(frames))


def store_parquet(path, raw):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(
        list(map(json.loads, raw.split(b"\n")[:-1]))
    )
    parquet.write_table(table, path.with_name("a.parquet"), row_group_size=2)


def store_bom(path, raw):
    path.with_name("a.jsonl").write_bytes(b"\xef\xbb\xbf" + raw)


def store_crlf(path, raw):
    path.with_name("a.ndjson").write_bytes(raw.replace(b"\n", b"\r\n\r\n"))


@pytest.mark.parametrize("store", [store_gz, store_zst, store_parquet, store_bom, store_crlf])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, store):
    raw = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
    (tmp_path / "in").mkdir()
    store(tmp_path / "in" / "a", raw)
    totals = prepare([str(tmp_path / "in")], str(tmp_path / "out"), BYTES)
    assert texts_of(tmp_path / "out") == ended(TEXTS)
    (source,) = (tmp_path / "in").iterdir()
    assert totals.read_bytes == source.stat().st_size


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_document(tmp_path, name):
    raw = b"\xef\xbb\xbf" + "zwei\n\nAbsätze".encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    prepare([str(tmp_path / name)], str(tmp_path / "out"), BYTES)
    assert texts_of(tmp_path / "out") == ["zwei\n\nAbsätze\0"]


@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_long_text_file_is_read_in_pieces_but_one_document(tmp_path, tokenizer, workers):
    text = "".join(f"{i} {'ä' * (i % 7)} zwei  drei\n\n" for i in range(150_000))
    assert len(text.encode()) > 2 * BLOCK_BYTES
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    (tmp_path / "c.txt").write_text("kurz", encoding="utf-8")
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    recipe = Recipe(Layout(), tokenizer, "<u2")
    totals = prepare([str(tmp_path)], str(tmp_path / "out"), recipe, workers)
    data, encode = BinIdx(tmp_path / "out"), load_tokenizer(tokenizer).encode
    documents = [*(text for text in TEXTS if text), text, "kurz"]
    assert len(data) == totals.documents == len(documents)
    for i, document in enumerate(documents):
        assert data.doc(i).tolist() == [*encode(document), 0]


@pytest.mark.parametrize("place", [0, BLOCK_BYTES - 1, 2 * BLOCK_BYTES])
def test_a_long_text_file_with_a_bad_byte_is_left_out_as_a_whole(tmp_path, place):
    raw = bytearray(b"zwei\n" * BLOCK_BYTES)
    raw[place] = 0xC3
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt").write_text("gut")
    recipe = Recipe(Layout(), "world", "<u2", on_bad="skip")
    totals = prepare([str(tmp_path)], str(tmp_path / "out"), recipe)
    assert (totals.documents, totals.skipped) == (1, 1)
    assert totals.first_bad.endswith(f"a.txt:1: byte 0xc3 at {place} is not UTF-8")


def test_inputs_are_files_globs_and_folders_in_order_and_once(tmp_path):
    for name in ("b.jsonl", "a.txt", "c.md", "sub/d.jsonl.gz", "with space.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(*patterns):
        return [path.name for path in find_inputs([str(tmp_path / p) for p in patterns])]

    assert names(".") == ["a.txt", "b.jsonl", "d.jsonl.gz", "with space.jsonl"]
    assert names("*.jsonl") == ["b.jsonl", "with space.jsonl"]
    assert names("b.jsonl", "*.jsonl") == ["b.jsonl", "with space.jsonl"]
    assert names("**/*.gz") == ["d.jsonl.gz"]


def test_blocks_hold_whole_lines_and_their_numbers(tmp_path):
    lines = [json.dumps({"text": "y" * (i * 977 % 9000)}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    blocks = list(read_blocks(tmp_path / "a.jsonl", "text"))
    assert len(blocks) > 1
    places = [where.rsplit(":", 1)[1] for block in blocks for where, _ in block.records()]
    assert list(map(int, places)) == list(range(1, 401))


def test_the_output_folder_is_made(tmp_path):
    prepare([write_jsonl(tmp_path / "a.jsonl", TEXTS)], str(tmp_path / "x/y/out.bin"), BYTES)
    assert texts_of(tmp_path / "x/y/out") == ended(TEXTS)


def json2binidx_files(documents) -> tuple[bytes, bytes]:
    """What json2binidx writes for the World vocabulary: int32, one boundary per document."""
    n = len(documents)
    starts = [0, *accumulate(4 * len(ids) for ids in documents)][:n]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, n, n + 1)
    index += struct.pack(f"<{n}i{n}q{n + 1}q", *map(len, documents), *starts, *range(n + 1))
    return b"".join(struct.pack(f"<{len(ids)}i", *ids) for ids in documents), index


@pytest.mark.parametrize("end", [True, False])
def test_world_data_in_int32_equals_json2binidx(tmp_path, end):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare([source], str(tmp_path / "out"), Recipe(Layout(), "world", "<i4", end=end))
    encode = load_tokenizer("world").encode
    expected = json2binidx_files([encode(text) + [0] * end for text in TEXTS if text])
    assert (tmp_path / "out.bin").read_bytes() == expected[0]
    assert (tmp_path / "out.idx").read_bytes() == expected[1]
