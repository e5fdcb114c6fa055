"""Log-likelihoods of tokens in their contexts, several documents at a time."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from finchtune.models import LanguageModel

BATCH_TOKENS = 8192
CHUNK = 1024  # tokens of a document in one call; the state carries over
HEAD_ROWS = 1024  # positions whose logits are in memory at once

Document = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and which of them count; never the first."""


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, documents: Sequence[Document]
) -> list[tuple[float, bool]]:
    """For each document the sum, in nats, of log p(token | all before it) over those that count,
    and whether each of them is the likeliest there.
    """
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i][0]))
    found: dict[int, tuple[float, bool]] = {}
    while order:
        n = max(1, BATCH_TOKENS // max(len(documents[order[0]][0]), 1))
        part, order = order[:n], order[n:]
        found |= zip(part, of_batch(model, [documents[i] for i in part]), strict=True)
    return [found[i] for i in range(len(documents))]


def of_batch(model: LanguageModel, documents: Sequence[Document]) -> list[tuple[float, bool]]:
    """`log_likelihoods` of documents that advance together, padded on the right."""
    device = next(model.parameters()).device
    ids, counted = (
        torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, column)), batch_first=True)
        for column in zip(*documents, strict=True)
    )
    ids, counted = ids.to(device), counted.bool().to(device)
    assert not counted[:, 0].any()
    sums = torch.zeros(len(documents), dtype=torch.float64)
    likeliest = torch.ones(len(documents), dtype=torch.bool)
    state = None
    for start in range(0, max(ids.shape[1] - 1, 0), CHUNK):
        end = min(start + CHUNK, ids.shape[1] - 1)
        hidden, state = model.hidden(ids[:, start:end], state)
        rows, places = counted[:, start + 1 : end + 1].nonzero(as_tuple=True)
        targets = ids[rows, start + 1 + places]
        for own, values, best in scored(model, hidden[rows, places], rows, targets):
            sums.index_add_(0, own, values)
            likeliest[own[~best]] = False
    return list(zip(sums.tolist(), likeliest.tolist(), strict=True))


def scored(
    model: LanguageModel, hidden: Tensor, rows: Tensor, targets: Tensor
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Of each position: its document, the target's log-probability, whether it is the likeliest."""
    for x, own, wanted in zip(
        *(part.split(HEAD_ROWS) for part in (hidden, rows, targets)), strict=True
    ):
        logits = model.head(x).float()
        values = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        yield own.cpu(), values.double().cpu(), (logits.argmax(-1) == wanted).cpu()
