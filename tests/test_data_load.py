"""Sampling: every token where it belongs, once per epoch, however a step is split."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finchtune.binidx import BinIdxWriter
from finchtune.data import load_data
from finchtune.data.render import PROMPT
from finchtune.data.sampling import best_fit, magic_prime
from finchtune.errors import UserError
from finchtune.tokenizer import BytesTokenizer

CTX_LEN = 24
SIZES = [2, 40, 17, 1, 25, 24, 0, 9, 33, 5, 12]


def document(i: int) -> list[int]:
    """Tokens that tell document and position, for documents of up to 50 tokens."""
    return [1 + 50 * i + j for j in range(SIZES[i])]


@pytest.fixture
def corpus(tmp_path) -> str:
    """A .bin/.idx pair whose documents have SIZES tokens, all of them different."""
    prefix = str(tmp_path / "corpus")
    with BinIdxWriter(prefix, "<u2") as writer:
        for i in range(len(SIZES)):
            writer.add(document(i))
    return prefix


@pytest.fixture
def questions(tmp_path) -> str:
    """Question/answer pairs as .jsonl."""
    path = tmp_path / "qa.jsonl"
    rows = [{"question": "q" * i, "answer": "a" * (2 * i)} for i in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(prefix, dataload, seed=1, ctx_len=CTX_LEN):
    return load_data(prefix, "binidx", dataload, ctx_len, seed=seed)


def load_questions(path, dataload="pad", ctx_len=300, loss_mask="qa"):
    return load_data(
        path, "sft", dataload, ctx_len, loss_mask, ["question", "answer"], BytesTokenizer(), 256
    )


def epoch_of(data, epoch=0, micro_bsz=1):
    """The micro batches of one epoch."""
    steps = range(epoch * data.n_rows // micro_bsz, (epoch + 1) * data.n_rows // micro_bsz)
    return [data.rows(step, 0, 1, micro_bsz, 1)[0] for step in steps]


def sequences(batch):
    """Each row of a batch, or each packed sequence, as its inputs and counted (place, target)s."""
    if batch.cu_seqlens is None:
        rows = zip(batch.tokens, batch.labels, strict=True)
    else:
        bounds = list(pairwise(batch.cu_seqlens.tolist()))
        rows = [(batch.tokens[0, a:b], batch.labels[0, a:b]) for a, b in bounds]
    for tokens, labels in rows:
        targets = [(t, int(label)) for t, label in enumerate(labels) if label != -100]
        yield tokens.tolist(), targets


@pytest.mark.parametrize("dataload", ["pad", "pack", "only"])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_document_stands_once_in_an_epoch(corpus, dataload, epoch):
    data = load(corpus, dataload)
    seen = []
    for batch in epoch_of(data, epoch):
        for tokens, targets in sequences(batch):
            if targets:
                seen.append(tokens[:1] + [label for _, label in targets])
                assert [place for place, _ in targets] == list(range(len(targets)))
                assert tokens[: len(targets)] == seen[-1][:-1]
    expected = [document(i)[: CTX_LEN + 1] for i in range(len(SIZES)) if SIZES[i] >= 2]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("dataload", ["pad", "pack", "only", "get"])
def test_epochs_and_seeds_differ_and_repeat(corpus, dataload):
    ctx_len = 6 if dataload == "get" else CTX_LEN

    def order(seed, epoch):
        data = load(corpus, dataload, seed, ctx_len)
        return [batch.tokens.tolist() for batch in epoch_of(data, epoch)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_negative_seeds_are_seeds_too(corpus):
    assert load(corpus, "pad", seed=-1).document_ids(0, 0, 1, 8, 1)


@pytest.mark.parametrize("dataload", ["pad", "pack", "get"])
@pytest.mark.parametrize("split", [(1, 1, 12), (2, 3, 2), (3, 1, 4), (4, 3, 1), (1, 12, 1)])
def test_the_rows_of_a_step_do_not_depend_on_how_it_is_split(corpus, dataload, split):
    world, micro_bsz, accumulate = split
    data = load(corpus, dataload, ctx_len=8)
    for step in (0, 1, 5):
        documents, targets = [], []
        for rank in range(world):
            arguments = (step, rank, world, micro_bsz, accumulate)
            documents += data.document_ids(*arguments)
            batches = data.rows(*arguments)
            assert len(batches) == accumulate
            targets += [label for batch in batches for label in batch.labels[batch.labels >= 0]]
        assert sorted(documents) == sorted(data.document_ids(step, 0, 1, 12, 1))
        whole = data.rows(step, 0, 1, 12, 1)[0].labels
        assert sorted(map(int, targets)) == sorted(whole[whole >= 0].tolist())


def test_a_step_is_the_same_in_any_order_of_asking(corpus):
    data = load(corpus, "pad")
    later = data.rows(40, 0, 1, 3, 1)[0].tokens
    data.rows(0, 0, 1, 3, 1)
    assert torch.equal(data.rows(40, 0, 1, 3, 1)[0].tokens, later)


def test_rows_are_padded_to_the_longest_rounded_up(corpus):
    data = load(corpus, "pad", ctx_len=39)
    for batch in epoch_of(data, micro_bsz=2):
        longest = max(len(targets) for _, targets in sequences(batch))
        assert (
            batch.tokens.shape == batch.labels.shape == (2, min(math.ceil(longest / 16) * 16, 39))
        )
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert (batch.tokens[batch.labels == -100] == 0).all()


def test_only_gives_unpadded_documents_one_at_a_time(corpus):
    data = load(corpus, "only")
    lengths = sorted(batch.tokens.shape[1] for batch in epoch_of(data))
    assert lengths == sorted(min(size - 1, CTX_LEN) for size in SIZES if size >= 2)
    with pytest.raises(UserError, match="--dataload only takes --micro_bsz 1, not 2"):
        data.rows(0, 0, 1, 2, 1)


def test_packed_rows_fit_and_waste_little(corpus):
    data = load(corpus, "pack")
    for batch in epoch_of(data):
        used = batch.labels.ne(-100).sum()
        assert batch.tokens.shape[0] == 1
        assert used <= CTX_LEN
        assert batch.tokens.shape[1] == math.ceil(used / 16) * 16
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == batch.tokens.shape[1]
        assert (batch.cu_seqlens.diff() > 0).all()
    places = sum(min(size - 1, CTX_LEN) for size in SIZES if size >= 2)
    assert data.n_rows == math.ceil(places / CTX_LEN)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), capacity=st.integers(20, 40))
@settings(max_examples=100)
def test_bins_hold_everything_once_within_the_known_bound(lengths, capacity):
    bins = best_fit(np.array(lengths), capacity)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in members) for members in bins]
    assert max(sums) <= capacity
    assert len(bins) <= 11 / 9 * math.ceil(sum(lengths) / capacity) * 1.5 + 1
    assert sum(s <= capacity / 2 for s in sums) <= 1


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_every_window_stands_once_in_an_epoch(tmp_path, n):
    prefix = tmp_path / "stream"
    stream = np.arange(1, 5 * n + 4)
    with BinIdxWriter(prefix, "<u2") as writer:
        writer.extend(stream.astype("<u2"), [len(stream)])
    data = load(str(prefix), "get", ctx_len=5)
    assert data.n_rows == n
    for epoch in (0, 1):
        batches = epoch_of(data, epoch)
        assert sorted(int(b.tokens[0, 0]) for b in batches) == [1 + 5 * k for k in range(n)]
        for batch in batches:
            assert torch.equal(batch.labels[0], batch.tokens[0] + 1)


def test_windows_are_not_in_the_stream_order(corpus):
    data = load(corpus, "get", ctx_len=2)
    starts = [int(batch.tokens[0, 0]) for batch in epoch_of(data)]
    assert starts != sorted(starts)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 100, 1000])
def test_the_magic_prime_makes_cubing_a_bijection(n):
    p = magic_prime(n)
    assert p >= n
    assert len({x**3 % p for x in range(p)}) == p


def test_the_answer_and_its_end_alone_are_trained_on(questions):
    data = load_questions(questions)
    answers = set()
    for batch in epoch_of(data):
        ((tokens, targets),) = sequences(batch)
        text = bytes(tokens).decode().rstrip("\0")
        answer = bytes(label for _, label in targets)
        answers.add(answer)
        prompt = PROMPT.format(question="q" * (len(answer) // 2))
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
    path.write_text('{"text": "good"}\n{"text": 1}\nbad\n\n{"text": ""}\n')
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
        (None, {"data_type": "dummy"}, "--data_type dummy: choose one of binidx, jsonl, sft"),
        (None, {"dataload": "packed"}, "--dataload packed: choose one of pad, get, pack, only"),
        (None, {"loss_mask": "se"}, "--loss_mask se: choose one of none, pad, qa"),
        (None, {"data_type": "sft"}, "--data_type sft needs --sft_field with two names"),
        (None, {"data_type": "sft", "sft_field": ["a"]}, r"not a$"),
        (None, {"sft_field": ["a", "b"]}, "--sft_field belongs to --data_type sft, not binidx"),
        (None, {"data_type": "jsonl"}, "--data_type jsonl needs a tokenizer"),
        (None, {"ctx_len": 0}, "--ctx_len 0 must be at least 1"),
        (None, {"val_split": 1.0}, r"--val_split 1\.0 must be at least 0 and below 1"),
        (None, {"val_split": 0.1, "dataload": "get"}, "cannot hold some out; split the data"),
        (None, {"val_split": 1e-9}, "--val_split 1e-09 leaves no document to hold out"),
        (None, {"val_split": 1 - 1e-9}, "leaves no document to train on"),
        (None, {"vocab_size": 500}, r"corpus\.bin: document 10, position 0: token id 501"),
        (None, {"dataload": "get", "ctx_len": 168}, "168 tokens are too few for one window"),
        (None, {"loss_mask": "qa"}, r"corpus\.mask\.bin and \.idx, which say what to train on"),
        (mask_of_other_sizes, {"loss_mask": "qa"}, r"corpus\.mask\.idx does not match"),
        (mask_of_zeros, {"loss_mask": "qa"}, "--loss_mask qa leaves no token to train on"),
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
    with pytest.raises(UserError, match=r"is no \.bin/\.idx pair; read it with --data_type jsonl"):
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
    with pytest.raises(UserError, match="leaves no token to train on within --ctx_len 20"):
        load_questions(questions, ctx_len=20)


def test_real_questions_load(gsm8k_train):
    from finchtune.tokenizer import load_tokenizer

    world = load_tokenizer("world")
    data = load_data(str(gsm8k_train), "sft", "pack", 512, "qa", ["question", "answer"], world)
    described = data.describe()
    assert described["documents"] == 7473
    assert described["padding_waste"] < 0.05
    assert 0.4 < described["trained_tokens"] / described["tokens"] < 0.7
