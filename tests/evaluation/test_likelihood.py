"""Log-likelihoods of documents together are those of each one's logits alone."""

import pytest
import torch
from helpers.support import small_model

from finchtune.evaluation import likelihood
from finchtune.evaluation.asking import Asker, Item
from finchtune.evaluation.likelihood import log_likelihoods
from finchtune.evaluation.task import Choices
from finchtune.evaluation.tasks.loss import Loss
from finchtune.tokenizer import BytesTokenizer

DOCUMENTS = [
    ([0, *range(1, 40)], [False] * 20 + [True] * 20),
    ([5, 6], [False, True]),
    ([9], [False]),
    ([7] * 90, [False] + [i % 3 == 0 for i in range(89)]),
]


def one_by_one(model, ids, counted):
    """From the logits of one document, read whole."""
    logits = model(torch.tensor([ids]))[0][0].double().log_softmax(-1)
    places = [i for i, counts in enumerate(counted) if counts]
    total = sum(logits[i - 1, ids[i]].item() for i in places)
    return total, all(logits[i - 1].argmax().item() == ids[i] for i in places)


@pytest.mark.parametrize("limits", [(8192, 1024, 1024), (64, 16, 7)])
@torch.no_grad()
def test_batched_equals_one_by_one(limits, monkeypatch):
    for name, value in zip(("BATCH_TOKENS", "CHUNK", "HEAD_ROWS"), limits, strict=True):
        monkeypatch.setattr(likelihood, name, value)
    model = small_model()
    found = log_likelihoods(model, DOCUMENTS)
    expected = [one_by_one(model, *document) for document in DOCUMENTS]
    assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], rel=1e-5)
    assert [f[1] for f in found] == [e[1] for e in expected]


@torch.no_grad()
def test_likeliest_continuation_is_told():
    model = small_model()
    ids = [3, 4, 5]
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    counted = [False] * 3 + [True] * 4
    assert log_likelihoods(model, [(ids, counted)])[0][1]
    assert not log_likelihoods(model, [([*ids[:-1], (ids[-1] + 1) % 256], counted)])[0][1]


@torch.no_grad()
def test_loss_task_is_the_training_loss():
    """Of the answer and the end of its document, as train.py masks them."""
    model, tokenizer = small_model(), BytesTokenizer()
    task = Loss(Choices(fields=("question", "answer")))
    records = [{"question": "1+1?", "answer": "2"}, {"question": "Why?", "answer": "Because."}]
    rows = task.rows(Asker(model, tokenizer), [Item(i, 0, r) for i, r in enumerate(records)])
    for row, record in zip(rows, records, strict=True):
        (prompt, _), (answer, _) = task.layout.pieces(record)
        ids = torch.tensor([[0, *tokenizer.encode(prompt), *tokenizer.encode(answer), 0]])
        labels = ids[:, 1:].clone()
        labels[0, : len(tokenizer.encode(prompt))] = -100
        loss, _ = model.loss(ids[:, :-1], labels)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert (row["tokens"], row["bytes"]) == (len(answer) + 1, len(answer))
    summary = task.summary(rows)
    assert summary["loss"] == pytest.approx(sum(r["loss"] for r in rows) / summary["tokens"])
    assert "perplexity" in task.line(summary)
