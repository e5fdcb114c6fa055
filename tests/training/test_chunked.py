"""Contexts trained on in chunks, against the whole context at once."""

import itertools
import json
from functools import partial

import pytest
import torch
from helpers.contexts import (
    gradients,
    long_batch,
    plain_gradients,
    segments,
    trainable,
    whole_context,
)
from helpers.support import every_generation, peak_bytes, relative_error, run_script
from torch.utils._pytree import tree_leaves

from finchtune.data.batch import Batch, padded
from finchtune.data.chunks import cut
from finchtune.training.chunked import (
    chunked_loss,
    exact_backward,
    own_calls,
    truncated_backward,
)

KINDS = ("row", "rows", "packed")
TRAINED = ("all", "bone", "state", "bone+state")
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


def scaled(factor=1.0):
    def backward(loss, added):
        ((loss + added) * factor).backward()

    return backward


def assert_same(found, expected, limit):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < limit, name


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("length", "generation"), [(16, 6), (25, 6), (13, 6), (64, 6), (13, 7), (25, 7)]
)
def test_exact_is_the_gradient_of_the_whole_context(dtype, trained, kind, length, generation):
    model, batch = trainable(trained, dtype, generation=generation), long_batch(kind)
    loss, expected = whole_context(trained, dtype, kind, generation)
    found = exact_backward(*own_calls(model), cut(batch, length), scaled())
    assert relative_error(found, loss) < LIMITS[dtype]
    assert_same(gradients(model), expected, LIMITS[dtype])


@every_generation
@pytest.mark.parametrize("grad_checkpoint", [1, 2])
def test_with_recomputation_a_factor_and_states_on_the_host(grad_checkpoint, generation):
    model = trainable("all", torch.float64, grad_checkpoint, generation)
    batch = long_batch("rows")
    _, expected = plain_gradients(model, batch)
    exact_backward(*own_calls(model), cut(batch, 13), scaled(1 / 3), offload=True)
    assert_same({n: 3 * g for n, g in gradients(model).items()}, expected, 1e-10)


def test_dropout_falls_alike_whenever_a_chunk_is_read():
    """Two gradients from one random state agree, and the state between chunks is that of both."""
    model, batch = trainable("lora", torch.float64), long_batch("row")
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    seen = {}
    read, lose = own_calls(model)

    def reading(batch, state):
        after = read(batch, state)
        seen[batch.tokens.sum().item()] = after[-1].wkv
        return after

    def losing(batch, state):
        loss, after = lose(batch, state)
        key = batch.tokens.sum().item()
        assert key not in seen or torch.equal(seen[key], after[-1].wkv)
        return loss, after

    exact_backward(reading, losing, cut(batch, 13), scaled())
    assert len(seen) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_is_what_it_says(kind):
    """Plainly: the loss of every token, with the state detached wherever a chunk begins."""
    model, batch, length = trainable("bone+state", torch.float64), long_batch(kind), 13
    chunks = cut(batch, length)
    found = truncated_backward(own_calls(model)[1], chunks, scaled())
    truncated = gradients(model)
    model.zero_grad(set_to_none=True)
    bounds = [0, *batch.tokens.shape] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    rows = [(b, 0, 50) for b in range(len(batch.tokens))]
    if batch.cu_seqlens is not None:
        rows = [(0, start, stop) for start, stop in itertools.pairwise(bounds)]
    total = torch.zeros((), dtype=torch.float64)
    for b, start, stop in rows:
        state = None
        edges = [start, *(e for e in range(0, stop, length) if start < e), stop]
        for first, last in itertools.pairwise(edges):
            loss, state = model.loss(
                batch.tokens[b : b + 1, first:last],
                batch.labels[b : b + 1, first:last],
                state=state,
            )
            total = total + loss
            state = [type(part)(*(x.detach() for x in part)) for part in state]
    total.backward()
    assert relative_error(found, total) < 1e-10
    assert_same(truncated, gradients(model), 1e-10)
    _, whole = plain_gradients(trainable("bone+state", torch.float64), batch)
    name = "blocks.0.att.key.adapter.bone"
    assert relative_error(truncated[name], whole[name]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_chunks(kind):
    model, batch = trainable("all", torch.float64), long_batch(kind)
    found = chunked_loss(own_calls(model)[1], cut(batch, 13))
    assert relative_error(found, model.loss(*batch)[0]) < 1e-10


def test_a_batch_without_labels_contributes_nothing():
    model, batch = trainable("all"), long_batch("rows")
    batch.labels.fill_(-100)
    chunks = cut(batch, 16)
    assert len(chunks) == 1
    assert exact_backward(*own_calls(model), chunks, scaled()) == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("length", [9, 10, 12, 16])
def test_no_chunk_begins_after_the_last_label(length):
    """The last label lies at 9; rounding up to 16 tokens must not make a chunk of its own."""
    tokens = torch.randint(1, 64, (2, 64))
    labels = torch.full_like(tokens, -100)
    labels[:, :10] = tokens[:, :10]
    chunks = cut(Batch(tokens, labels), length)
    assert all(len(chunk.batch.tokens) for chunk in chunks)
    assert sum(int((chunk.batch.labels != -100).sum()) for chunk in chunks) == 20


def test_rows_are_read_no_further_than_their_last_label():
    assert [len(chunk.batch.tokens) for chunk in cut(long_batch("rows"), 10)] == [3, 2, 2, 1, 1]


def test_longer_contexts_take_the_memory_of_the_states_between_chunks():
    """By torch's own account, at 4 and at 32 chunks."""
    model = trainable("bone")
    _, state = model.hidden(torch.zeros(1, 16, dtype=torch.int64))
    boundary = sum(leaf.nbytes for leaf in tree_leaves(state))
    peaks = []
    for n_chunks in (4, 32):
        batch = padded(segments((16 * n_chunks,)), 16 * n_chunks)
        peaks.append(
            peak_bytes(partial(exact_backward, *own_calls(model), cut(batch, 16), scaled()))
        )
    assert 0.5 * 28 * boundary < peaks[1] - peaks[0] < 1.5 * 28 * boundary
    assert peaks[0] > 10 * boundary


@pytest.mark.slow
def test_a_process_grows_by_the_states_between_chunks():
    """Of its resident memory: 4 layers of 2 heads, 128 channels, from 2 chunks to 32."""
    peaks = []
    for length in (512, 8192):
        words = f"one --layers 4 --channels 128 --length {length} --chunk 256 --repeats 1"
        done = run_script("scripts/bench/long_context.py", *words.split())
        peaks.append(json.loads(done.stdout)["peak_mib"])
    states = 30 * 4 * (2 * 64 * 64 + 2 * 128) * 4 / 2**20
    assert peaks[1] - peaks[0] < 2 * states
