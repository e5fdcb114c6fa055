"""Documents packed into one row train exactly as they would alone."""

from itertools import pairwise

import pytest
import torch
from helpers.support import relative_error, small_model

from finchtune.data import Batch, load_data
from finchtune.data.batch import packed
from finchtune.data.sampling import Segment
from finchtune.tokenizer import load_tokenizer

LENGTHS = [1, 2, 40, 16, 7, 65, 3]


def segments() -> list[Segment]:
    """Random documents of LENGTHS inputs, half of their tokens no target."""
    documents = [torch.randint(0, 256, (length + 1,)).numpy() for length in LENGTHS]
    masks = [torch.randint(0, 2, (length + 1,)).numpy() for length in LENGTHS]
    return [
        Segment(ids, mask, i) for i, (ids, mask) in enumerate(zip(documents, masks, strict=True))
    ]


def losses_of_sequences(model, batch: Batch) -> torch.Tensor:
    """Summed loss of each packed sequence (S,)."""
    hidden, _ = model.hidden(batch.tokens, cu_seqlens=batch.cu_seqlens)
    bounds = pairwise(batch.cu_seqlens.tolist())
    return torch.stack([model.head(hidden[:, a:b], batch.labels[:, a:b]) for a, b in bounds])


def losses_alone(model, parts: list[Segment]) -> torch.Tensor:
    """Summed loss of each document in a forward pass of its own (S,)."""
    alone = [packed([part])._replace(cu_seqlens=None) for part in parts]
    return torch.stack([model.loss(*batch)[0] for batch in alone])


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients_are_those_of_each_document_alone(dtype, grad_checkpoint):
    model = small_model().to(dtype)
    model.grad_checkpoint = grad_checkpoint
    parts = segments()
    batch = packed(parts)
    together, alone = losses_of_sequences(model, batch), losses_alone(model, parts)
    assert batch.cu_seqlens.diff().tolist() == [*LENGTHS, 10], "the last one is padding"
    assert together[-1] == 0
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(together[:-1], alone, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(model.loss(*batch)[0], alone.sum(), rtol=tolerance, atol=0)
    # One document's gradient: nothing of its neighbours reaches it.
    for i in (2, 5):
        expected = gradients(model, losses_alone(model, parts)[i])
        for name, found in gradients(model, losses_of_sequences(model, batch)[i]).items():
            assert relative_error(found, expected[name]) < tolerance, name


def test_questions_pack_into_rows_with_little_waste(word_problems):
    """At ctx_len 1024 less than 5 % is padding, where one document a row wastes over 70 %."""
    waste = {}
    for dataload in ("pack", "pad"):
        data = load_data(
            *(str(word_problems), "sft", dataload, 1024, "qa", ["question", "answer"]),
            tokenizer=load_tokenizer("world"),
        )
        waste[dataload] = data.describe()["padding_waste"]
    assert waste["pack"] < 0.05
    assert waste["pad"] > 0.70
