"""Text from a model in one call: a list of prompts, or one prompt token by token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from finchtune.errors import UserError
from finchtune.inference.engine import Engine, Request
from finchtune.inference.sampling import Sampling
from finchtune.tokenizer import END_OF_DOCUMENT, Tokenizer


def generate_batch(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float = 0.0,
    stop_tokens: Sequence[int] = (END_OF_DOCUMENT,),
    *,
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    seed: int | Sequence[int] | None = None,
    max_rows: int = 64,
    **sampling: Any,
) -> list[list[int]]:
    """Up to `max_tokens` token ids that follow each prompt, without what ended them.

    Prompts are token ids, of any lengths; an empty one begins a document. A row ends before one of
    `stop_tokens` (`()`: never) or, with a `tokenizer`, before a token that reaches into one of
    `stop_strings`. `seed` is one for all or one for each prompt, `sampling` further settings of
    `Sampling`. A row's result does not depend on the others. `max_rows` are written at once.

    Raises UserError for a setting out of its limits or an id outside the vocabulary.
    """
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds were given for {len(prompts)} prompts")
    engine = Engine(model, tokenizer, max_rows)
    rows = [
        engine.submit(
            Request(
                prompt,
                max_tokens,
                Sampling(temperature, seed=own, **sampling),
                stop_tokens,
                stop_strings,
            )
        )
        for prompt, own in zip(prompts, seeds, strict=True)
    ]
    with evaluating(model):
        while not engine.idle:
            engine.step()
    return [row.tokens for row in rows]


def generate(
    model: torch.nn.Module,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_tokens: Sequence[int] = (END_OF_DOCUMENT,),
    **sampling: Any,
) -> Iterator[int]:
    """Yield what `generate_batch` returns for one prompt, each token as it is drawn."""
    settings = Sampling(temperature, top_p, seed=seed, **sampling)
    engine = Engine(model, max_rows=1)
    row = engine.submit(Request(prompt, max_tokens, settings, stop_tokens))
    n_given = 0
    while not engine.idle:
        with evaluating(model):
            engine.step()
        yield from row.tokens[n_given:]
        n_given = len(row.tokens)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode: no dropout."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
