"""How many trained tokens are lost, counted once more by hand."""

import math

import numpy as np
import pytest

from finchtune.data import labels
from finchtune.data.documents import Documents

CTX_LEN = 10


def some_documents(masked: bool) -> Documents:
    """Documents of 0 to 29 tokens; the masks of some are empty, others end with untrained ones."""
    random = np.random.default_rng(1)
    sizes = random.integers(0, 30, 200)
    masks = [(random.random(size) < random.choice([0, 0.1, 0.5, 1])).astype("u1") for size in sizes]
    trained = np.concatenate(masks) if masked else None
    tokens = np.ones(sizes.sum(), "<u2")
    return Documents("test", tokens, np.concatenate([[0], np.cumsum(sizes)]), trained)


def targets_of(documents: Documents, i: int) -> list[int]:
    """Positions of the document's trained tokens that have one before them."""
    begin, end = documents.offsets[i], documents.offsets[i + 1]
    return [
        p
        for p in range(1, end - begin)
        if documents.trained is None or documents.trained[begin + p]
    ]


@pytest.mark.parametrize("masked", [True, False])
def test_every_loss_is_counted(masked):
    documents = some_documents(masked)
    chosen = np.flatnonzero(documents.sizes >= 2)
    found = labels.of_documents(documents, chosen, CTX_LEN)
    targets = [targets_of(documents, i) for i in chosen]
    kept = [[p for p in positions if p <= CTX_LEN] for positions in targets]
    assert found.needed.tolist() == [max(positions, default=0) for positions in targets]
    assert found.untrained == sum(not positions for positions in targets)
    assert found.emptied == sum(bool(a) and not b for a, b in zip(targets, kept, strict=True))
    assert found.cut == (documents.sizes > CTX_LEN + 1).sum()
    assert found.lost_tokens == np.maximum(documents.sizes - CTX_LEN - 1, 0).sum()
    assert found.lost_targets == sum(map(len, targets)) - sum(map(len, kept))
    assert found.too_short == (documents.sizes < 2).sum()
    assert found.untrained == 0 or masked


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 1])
def test_the_ctx_len_that_keeps_a_share_is_the_least(share):
    documents = some_documents(masked=True)
    chosen = np.flatnonzero(documents.sizes >= 2)
    wanted = labels.of_documents(documents, chosen, CTX_LEN).ctx_len_for(share)
    trained = [t for t in (targets_of(documents, i) for i in chosen) if t]
    whole = [sum(max(t) <= ctx_len for t in trained) for ctx_len in (wanted, wanted - 1)]
    assert whole[0] >= math.ceil(share * len(trained)) > whole[1]


def test_nothing_lost_is_told_as_well():
    documents = Documents("test", np.ones(4, "<u2"), np.array([0, 4]))
    lines = dict(labels.of_documents(documents, np.array([0]), 8).lines())
    assert lines["labels"] == "each of 1 documents has a trained token"
    assert lines["ctx_len"].startswith("3 keeps")


def test_windows_without_a_target_are_counted():
    trained = np.array([1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1], "u1")
    documents = Documents("test", np.ones(11, "<u2"), np.array([0, 11]), trained)
    found = labels.of_windows(documents, 5, 2)  # targets 1-2, 3-4, 5-6, 7-8, 9-10
    assert found.untrained == 3
    assert dict(found.lines())["labels"].startswith("3 of 5 windows train nothing")


def test_data_sets_add_up():
    documents = some_documents(masked=True)
    chosen = np.flatnonzero(documents.sizes >= 2)
    whole = labels.of_documents(documents, chosen, CTX_LEN)
    halves = [labels.of_documents(documents, part, CTX_LEN) for part in np.split(chosen, [50])]
    together = labels.together(halves).numbers()
    assert together == whole.numbers() | {"too_short_documents": 2 * whole.too_short}
