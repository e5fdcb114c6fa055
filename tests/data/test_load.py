"""What is trained on and counted of a data set, and what is refused."""

import json

import pytest
from helpers.small_corpus import CTX_LEN, SIZES, epoch_of, load, sequences, write_corpus

from finchtune.data import load_data, templates
from finchtune.data.binidx import BinIdxWriter
from finchtune.errors import UserError
from finchtune.tokenizer import BytesTokenizer


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_corpus(tmp_path)


@pytest.fixture
def questions(tmp_path) -> str:
    """Question/answer pairs as .jsonl."""
    path = tmp_path / "qa.jsonl"
    rows = [{"question": "q" * i, "answer": "a" * (2 * i)} for i in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load_questions(path, dataload="pad", ctx_len=300, loss_mask="qa"):
    return load_data(
        path, "sft", dataload, ctx_len, loss_mask, ["question", "answer"], BytesTokenizer(), 256
    )


def test_the_answer_and_its_end_alone_are_trained_on(questions):
    data = load_questions(questions)
    answers = set()
    for batch in epoch_of(data):
        ((tokens, targets),) = sequences(batch)
        text = bytes(tokens).decode().rstrip("\0")
        answer = bytes(label for _, label in targets)
        answers.add(answer)
        prompt = templates.get("metamath").prompt("q" * (len(answer) // 2))
        assert text == prompt + "a" * (len(answer) - 1)
        assert targets[0][0] == len(prompt) - 1
    assert answers == {b"a" * (2 * i) + b"\0" for i in range(1, 6)}


@pytest.mark.parametrize("loss_mask", ["none", "pad"])
def test_without_a_mask_every_token_is_a_target(questions, loss_mask):
    data = load_questions(questions, loss_mask=loss_mask)
    for batch in epoch_of(data):
        ((tokens, targets),) = sequences(batch)
        assert len(targets) == len(bytes(tokens).rstrip(b"\0"))
        assert targets[-1][1] == 0


@pytest.mark.parametrize("dataload", ["pad", "pack", "only", "get"])
def test_the_described_targets_are_the_targets_of_an_epoch(questions, dataload):
    data = load_questions(questions, dataload, ctx_len=200 if dataload != "get" else 50)
    counted = sum(int((batch.labels >= 0).sum()) for batch in epoch_of(data))
    assert data.describe()["trained_tokens"] == counted


def test_the_description_counts_what_is_cut_and_padded(corpus):
    described = load(corpus, "pad").describe()
    used = [size for size in SIZES if size >= 2]
    assert described["documents"] == described["rows"] == len(used)
    assert described["tokens"] == load(corpus, "pad").n_tokens == sum(used)
    assert described["truncated_documents"] == sum(size > CTX_LEN + 1 for size in SIZES)
    assert described["truncated_tokens"] == sum(max(size - CTX_LEN - 1, 0) for size in SIZES)
    inputs = sum(min(size - 1, CTX_LEN) for size in SIZES if size)
    assert described["padding_waste"] == pytest.approx(1 - inputs / (9 * CTX_LEN))


def test_turns_in_plain_text_are_trained_on_under_qa(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"text": "User: a\n\nAssistant: b"}) + "\n")
    data = load_data(str(path), "jsonl", "only", 99, "qa", None, BytesTokenizer(), 256)
    ((_, targets),) = sequences(data.rows(0, 0, 1, 1, 1)[0])
    assert bytes(label for _, label in targets) == b" b\0"


def test_skipped_records_are_counted(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "good"}\n{"text": {}}\nbad\n\n{"text": ""}\n')
    data = load_data(str(path), "jsonl", "pad", 9, "pad", None, BytesTokenizer(), 256, 1, "skip")
    assert data.describe()["skipped_records"] == 2
    assert data.describe()["documents"] == 1


def test_a_mask_beside_a_binidx_is_used_under_qa(corpus):
    with BinIdxWriter(f"{corpus}.mask", "u1") as writer:
        for i, size in enumerate(SIZES):
            writer.add([i == 4] * size)
    data = load_data(corpus, "binidx", "pad", CTX_LEN, "qa")
    assert data.describe()["trained_tokens"] == 24
    assert load(corpus, "pad").describe()["trained_tokens"] > 24


@pytest.mark.parametrize("dataload", ["pad", "pack", "only", "get"])
def test_the_first_token_and_those_cut_off_are_no_targets(corpus, dataload):
    with BinIdxWriter(f"{corpus}.mask", "u1") as writer:
        for i, size in enumerate(SIZES):
            writer.add([1 if i in (0, 4) else j % 40 == 0 for j in range(size)])
    data = load_data(corpus, "binidx", dataload, 20, "qa")
    counted = sum(int((batch.labels >= 0).sum()) for batch in epoch_of(data))
    assert data.describe()["trained_tokens"] == counted


def mask_of_other_sizes(corpus):
    with BinIdxWriter(f"{corpus}.mask", "u1") as writer:
        writer.add([1] * sum(SIZES))


def mask_of_zeros(corpus):
    with BinIdxWriter(f"{corpus}.mask", "u1") as writer:
        for size in SIZES:
            writer.add([0] * size)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"data_type": "dummy"}, "`data_type` dummy: choose one of binidx, jsonl, sft"),
        (None, {"dataload": "packed"}, "`dataload` packed: choose one of pad, get, pack, only"),
        (None, {"loss_mask": "se"}, "`loss_mask` se: choose one of none, pad, qa"),
        (None, {"data_type": "sft"}, "`data_type` sft needs `sft_field` with two names"),
        (None, {"data_type": "sft", "sft_field": ["a"]}, r"not a$"),
        (None, {"sft_field": ["a", "b"]}, "`sft_field` belongs to `data_type` sft, not binidx"),
        (None, {"data_type": "jsonl"}, "`data_type` jsonl needs a tokenizer"),
        (None, {"ctx_len": 0}, "`ctx_len` 0 must be at least 1"),
        (None, {"val_split": 1.0}, r"`val_split` 1\.0 must be at least 0 and below 1"),
        (None, {"val_split": 0.1, "dataload": "get"}, "cannot hold some out; split the data"),
        (None, {"val_split": 1e-9}, "`val_split` 1e-09 leaves no document to hold out"),
        (None, {"val_split": 1 - 1e-9}, "leaves no document to train on"),
        (None, {"vocab_size": 500}, r"corpus\.bin: document 10, position 0: token id 501"),
        (None, {"dataload": "get", "ctx_len": 168}, "168 tokens are too few for one window"),
        (None, {"loss_mask": "qa"}, r"corpus\.mask\.bin and \.idx, which say what to train on"),
        (mask_of_other_sizes, {"loss_mask": "qa"}, r"corpus\.mask\.idx does not match"),
        (mask_of_zeros, {"loss_mask": "qa"}, "`loss_mask` qa leaves no token to train on"),
    ],
)
def test_what_does_not_fit_is_refused(corpus, change, arguments, message):
    if change:
        change(corpus)
    known = {"data_file": corpus, "data_type": "binidx", "dataload": "pad", "ctx_len": CTX_LEN}
    with pytest.raises(UserError, match=message):
        load_data(**(known | arguments))


def test_a_tokenizer_larger_than_the_model_is_refused(questions):
    with pytest.raises(UserError, match="tokenizer bytes has 256 tokens, but the model only 100"):
        load_data(questions, "jsonl", "pad", 8, tokenizer=BytesTokenizer(), vocab_size=100)


def test_text_read_as_a_pair_is_told(questions):
    with pytest.raises(UserError, match=r"is no \.bin/\.idx pair; read it with `data_type` jsonl"):
        load(questions, "pad")


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "there are no documents"), ([[1], [], [2]], "no document has two tokens")],
)
def test_data_without_a_target_is_refused(tmp_path, documents, message):
    with BinIdxWriter(tmp_path / "empty", "<u2") as writer:
        for tokens in documents:
            writer.add(tokens)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "empty"), "pad")


def test_prompts_longer_than_the_context_leave_nothing_to_train_on(questions):
    with pytest.raises(UserError, match="leaves no token to train on within `ctx_len` 20"):
        load_questions(questions, ctx_len=20)


def test_many_questions_load(word_problems):
    from finchtune.tokenizer import load_tokenizer

    world = load_tokenizer("world")
    data = load_data(str(word_problems), "sft", "pack", 1024, "qa", ["question", "answer"], world)
    described = data.describe()
    assert described["documents"] == 2000
    assert described["padding_waste"] < 0.05
    assert 0.2 < described["trained_tokens"] / described["tokens"] < 0.7
