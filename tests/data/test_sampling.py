"""Sampling: every token where it belongs, once per epoch, however a step is split."""

import math

import numpy as np
import pytest
import torch
from helpers.small_corpus import CTX_LEN, SIZES, document, epoch_of, load, sequences, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from finchtune.data.binidx import BinIdxWriter
from finchtune.data.sampling import best_fit, magic_prime
from finchtune.errors import UserError


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_corpus(tmp_path)


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
    with pytest.raises(UserError, match="`dataload` only takes `micro_bsz` 1, not 2"):
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
