"""scripts/prepare_data.py: its flags, its lines, its files, and json2binidx's spelling of them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers

from finchtune.data.binidx import BinIdx
from finchtune.tokenizer import load_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    texts = ["First document.", "Second, longer document.\n\nEnd.", "Third: 三"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_world_is_the_default_and_the_summary_says_what_was_written(run, corpus, tmp_path):
    status, out, err = run("--input", corpus, "--output", tmp_path / "out", "--workers", 1)
    assert status == 0
    data = BinIdx(tmp_path / "out")
    assert f"out: 3 documents, {data.n_tokens} tokens" in out
    assert "100%" in err
    world = load_tokenizer("world")
    assert world.decode(data.doc(0)) == "First document."
    assert [int(data.doc(i)[-1]) for i in range(3)] == [0, 0, 0]


def test_fields_masks_and_splits(run, tmp_path):
    rows = [{"instruction": f"i{i}", "input": "", "output": f"o{i}"} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = ("--sft_field", "instruction", "input", "output")
    status, out, _ = run(
        "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer", "bytes",
        *fields, "--val_split", 0.3, "--no_eod", "--workers", 2
    )  # fmt: skip
    assert status == 0
    assert "of the tokens are trained on under --loss_mask qa" in out
    sizes = [len(BinIdx(tmp_path / name)) for name in ("out", "out.mask", "out_val")]
    assert sizes[0] == sizes[1] == 50 - sizes[2]
    assert f"{sizes[2]} documents are in" in out
    assert bytes(BinIdx(tmp_path / "out").doc(0).tolist()).decode().endswith("step by step.o0")


def test_turns_of_plain_text_can_be_marked(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "User: a\n\nAssistant: b"}))
    run(
        "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer", "bytes",
        "--field", "body", "--loss_mask", "qa", "--workers", 1
    )  # fmt: skip
    assert BinIdx(tmp_path / "out.mask").tokens.sum() == len(" b\0")


def test_skipped_records_are_reported(run, corpus, tmp_path):
    corpus.write_text(corpus.read_text() + "{}\n")
    arguments = ("--input", corpus, "--output", tmp_path / "out", "--workers", 1)
    status, _, err = run(*arguments)
    assert status == 2
    assert err.rstrip().splitlines()[-1].startswith(f"error: {corpus}:4: there is no field 'text'")
    status, out, _ = run(*arguments, "--on_bad", "skip")
    assert status == 0
    assert f"skipped 1 bad records; the first: {corpus}:4" in out


@pytest.mark.parametrize(("vocab", "end"), [("file", True), ("file", False), ("none", True)])
def test_json2binidx_command_lines_work_unchanged(run, corpus, tmp_path, vocab, end):
    """Also where the vocabulary's usual file is not there: it is built in."""
    prefix = tmp_path / "sample"
    file = vocabulary() if vocab == "file" else tmp_path / "rwkv_vocab_v20230424.txt"
    status, _, _ = run(
        "--input", corpus, "--output-prefix", prefix, "--vocab", file,
        "--dataset-impl", "mmap", "--tokenizer-type", "RWKVTokenizer", "--workers", 1,
        *["--append-eod"] * end
    )  # fmt: skip
    assert status == 0
    data = BinIdx(f"{prefix}_text_document")
    assert data.dtype.str == "<i4"
    assert (data.doc(2)[-1] == 0) == end
    encode = load_tokenizer("world").encode
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert [data.doc(i).tolist() for i in range(3)] == [encode(t) + [0] * end for t in texts]
    names = {path.name for path in tmp_path.iterdir()}
    pair = {f"sample_text_document.{suffix}" for suffix in ("bin", "idx", "info.json")}
    assert names == {corpus.name, *pair}


def test_json2binidx_takes_its_inputs_with_commas(run, corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "more"}))
    status, _, _ = run(
        "--input", f"{corpus},{other}", "--output-prefix", tmp_path / "sample",
        "--tokenizer-type", "RWKVTokenizer", "--workers", 1
    )  # fmt: skip
    assert status == 0
    assert len(BinIdx(tmp_path / "sample_text_document")) == 4


def test_json2binidx_with_a_tokenizer_json(run, corpus, tmp_path, byte_level_bpe):
    status, _, _ = run(
        "--input", corpus, "--output-prefix", tmp_path / "sample", "--vocab", byte_level_bpe,
        "--dataset-impl", "mmap", "--tokenizer-type", "HFTokenizer", "--append-eod",
        "--workers", 2
    )  # fmt: skip
    assert status == 0
    data = BinIdx(tmp_path / "sample_text_document")
    plain = tokenizers.Tokenizer.from_file(byte_level_bpe)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert [data.doc(i).tolist() for i in range(3)] == [[*plain.encode(t).ids, 0] for t in texts]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "<u2"), (65_500, "<i4")])
def test_json2binidx_writes_int32_from_65500_ids_on(run, corpus, tmp_path, vocab_size, dtype):
    words = {f"w{i}": i for i in range(1, vocab_size)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<|endoftext|>": 0} | words, unk_token="w1")
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    status, _, _ = run(
        "--input", corpus, "--output-prefix", tmp_path / "sample",
        "--vocab", tmp_path / "tokenizer.json", "--tokenizer-type", "HFTokenizer", "--workers", 1
    )  # fmt: skip
    assert status == 0
    assert BinIdx(tmp_path / "sample_text_document").dtype.str == dtype


def vocabulary() -> Path:
    import pyrwkv_tokenizer

    return Path(pyrwkv_tokenizer.__file__).parent / "rwkv_vocab_v20230424.txt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output is needed"),
        (["--output", "x", "--append-eod"], "--append-eod goes with --output-prefix, not --output"),
        (["--output", "x", "--vocab", "v"], "--vocab goes with --output-prefix, not --output"),
        (["--output", "x", "--val_split", "1"], "--val_split 1.0 must be at least 0"),
        (["--output", "x", "--workers", "0"], "--workers 0 must be at least 1"),
        (["--output", "x", "--sft_field", "a"], "--sft_field takes two names"),
        (["--output", "x", "--tokenizer", "none.json"], "--tokenizer none.json: no such file"),
        (["--output-prefix", "x"], "--tokenizer-type is needed: RWKVTokenizer or HFTokenizer"),
        (["--output-prefix", "x", "--no_eod"], "--no_eod goes with --output, not --output-prefix"),
        (
            ["--output-prefix", "x", "--tokenizer-type", "HFTokenizer"],
            "--tokenizer-type HFTokenizer needs --vocab",
        ),
    ],
)
def test_flags_that_do_not_fit_stop_with_one_line(run, corpus, arguments, message):
    status, _, err = run("--input", corpus, *arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_terminated_run_leaves_nothing(tmp_path):
    """The real command, told to stop while it works."""
    lines = (json.dumps({"text": f"{i} " * 300}) + "\n" for i in range(30_000))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    arguments = ["--input", tmp_path / "a.jsonl", "--output", tmp_path / "out"]
    process = subprocess.Popen(
        list(map(str, [sys.executable, SCRIPT, *arguments])), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(os.listdir(tmp_path)) == 1 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_what_is_there_is_replaced_only_if_asked(run, corpus, tmp_path):
    flags = ("--input", corpus, "--output", tmp_path / "out", "--workers", 1)
    assert run(*flags, "--tokenizer", "bytes")[0] == 0
    before = (tmp_path / "out.bin").read_bytes()
    status, _, err = run(*flags)
    assert status == 2
    assert "out.bin or .idx is there already" in err
    assert (tmp_path / "out.bin").read_bytes() == before
    assert run(*flags, "--overwrite")[0] == 0
    assert (tmp_path / "out.bin").read_bytes() != before


def test_held_out_data_is_not_replaced_either(run, corpus, tmp_path):
    (tmp_path / "out_val.bin").write_bytes(b"mine")
    flags = ("--input", corpus, "--output", tmp_path / "out", "--workers", 1)
    status, _, err = run(*flags, "--val_split", 0.5)
    assert status == 2
    assert "out_val.bin or .idx is there already" in err
    assert run(*flags)[0] == 0
    assert (tmp_path / "out_val.bin").read_bytes() == b"mine"


def test_template_and_speakers_can_be_chosen(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "a", "a": "b"}')
    template = tmp_path / "mine.yaml"
    template.write_text('user: "Q: {question}\\n"\ncue: "A:"\n')
    flags = ("--tokenizer", "bytes", "--workers", 1)
    qa = ("--input", tmp_path / "a.jsonl", "--sft_field", "q", "a", "--template", template)
    assert run(*qa, "--output", tmp_path / "out", *flags)[0] == 0
    assert bytes(BinIdx(tmp_path / "out").doc(0).tolist()) == b"Q: a\nA:b\0"
    (tmp_path / "b.jsonl").write_text('{"text": "Kunde: a\\nBerater: b"}\n{"text": "c"}\n')
    turns = ("--input", tmp_path / "b.jsonl", "--loss_mask", "qa", "--speakers", "Kunde/Berater")
    status, out, _ = run(*turns, "--output", tmp_path / "out2", *flags)
    assert status == 0
    assert "1 documents have no trained token under --loss_mask qa" in out
    assert BinIdx(tmp_path / "out2.mask").tokens.sum() == len(" b\0")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--template", "alpacka"], "--template alpacka: did you mean alpaca?"),
        (["--loss_mask", "qa", "--speakers", "Kunde"], "--speakers Kunde: give who asks and who"),
        (["--speakers", "A/B"], "--speakers goes with --loss_mask qa"),
    ],
)
def test_wrong_templates_and_speakers_are_told(run, corpus, tmp_path, flags, message):
    status, _, err = run("--input", corpus, "--output", tmp_path / "out", *flags)
    assert status == 2
    assert message in err


def test_json2binidx_finds_the_vocabulary_that_comes_with_the_tokenizer(run, corpus, tmp_path):
    words = "--vocab rwkv_vocab_v20230424.txt --dataset-impl mmap --tokenizer-type RWKVTokenizer"
    prefix = tmp_path / "sample"
    assert run("--input", corpus, "--output-prefix", prefix, *words.split(), "--workers", 1)[0] == 0
    assert BinIdx(f"{prefix}_text_document").doc(0).tolist() == load_tokenizer("world").encode(
        "First document."
    )
