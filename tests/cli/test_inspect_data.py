"""scripts/inspect_data.py: its report, and its status for data that is wrong."""

from pathlib import Path

import pytest

from finchtune.data.binidx import BinIdxWriter
from finchtune.data.prepare import prepare
from finchtune.data.render import Layout
from finchtune.data.workers import Recipe

SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_data.py"


@pytest.fixture
def corpus(tmp_path) -> str:
    prefix = str(tmp_path / "corpus")
    with BinIdxWriter(prefix, "<u2") as writer, BinIdxWriter(prefix + ".mask", "u1") as mask:
        for text in (b"User: a\n\nAssistant: b\0", b"User: cc\n\nAssistant: dd\0"):
            writer.add(list(text))
            mask.add([0] * (len(text) - 4) + [1] * 4)
    return prefix


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_the_report_is_complete(run, corpus, suffix):
    status, out, _ = run(
        "--data_file", corpus + suffix, "--tokenizer", "bytes", "--ctx_len", 16, "--samples", 1
    )
    assert status == 0
    for line in (
        "the files fit together, every token id is below 256",
        "documents       2",
        "ending in 0     2 of 2 documents",
        "trained on      17.4% of the tokens",
        "pad at 16       2 rows, 0.0% padding",
        "pack at 16      2 rows",
        "labels          2 of 2 documents train nothing: 0 have no trained token, 2 lose theirs",
        "cut off         12 tokens of 2 documents longer than ctx_len 16, 8 of them trained",
        "vocabulary: 16 of 256 ids are used",
        "b's'",
    ):
        assert line in out
    assert sum(line.startswith("document ") for line in out.splitlines()) == 1
    assert "«" in out
    assert "\x1b" not in out


def test_colour_can_be_asked_for(run, corpus):
    arguments = ("--data_file", corpus, "--tokenizer", "bytes", "--color", "always")
    assert "\x1b[32m" in run(*arguments)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_file", "nowhere"], "nowhere.idx: No such file"),
        (["--tokenizer", "bytes", "--vocab_size", "100"], "has 256 tokens, but the model only 100"),
        (["--ctx_len", "0"], "--ctx_len must be at least 1"),
        (["--ctx_len", "9" * 20], "and at most 2,147,483,648"),
        (["--vocab_size", "9" * 20], "--vocab_size must be at least 1 and at most 16,777,216"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(run, corpus, arguments, message):
    status, _, err = run("--data_file", corpus, *arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_token_beyond_the_vocabulary_is_found(run, corpus):
    with BinIdxWriter(corpus, "<u2") as writer:
        writer.add([1, 2, 300])
    Path(corpus + ".mask.bin").unlink()
    Path(corpus + ".mask.idx").unlink()
    status, _, err = run("--data_file", corpus, "--tokenizer", "bytes")
    assert status == 2
    assert "document 0, position 2: token id 300" in err


def test_a_pair_names_its_tokenizer_and_template_and_refuses_others(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}')
    recipe = Recipe(Layout(("question", "answer")), "bytes", "<u2")
    prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), recipe)
    status, out, _ = run("--data_file", tmp_path / "out", "--ctx_len", 512)
    assert status == 0
    assert "tokenizer       bytes" in out
    assert "template        metamath" in out
    for flags in (("--tokenizer", "world"), ("--template", "chat")):
        status, _, err = run("--data_file", tmp_path / "out", *flags)
        assert status == 2
        assert f"was prepared with {flags[0]}" in err
