"""Text from a model, token by token, in the recurrent form: constant time and memory a token."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finchtune.errors import UserError
from finchtune.models.rwkv6 import RWKV6
from finchtune.tokenizer import END_OF_DOCUMENT

PROMPT_CHUNK = 1024  # prompt tokens read at once; the state carries over


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token id from logits (V,).

    Temperature 0 takes the likeliest. Otherwise the smallest set of tokens whose probability
    reaches `top_p` is kept and drawn from (nucleus sampling).
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    ordered, index = probabilities.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    ordered[before >= top_p] = 0
    return int(index[torch.multinomial(ordered, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: RWKV6,
    prompt: Sequence[int],
    n_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[int]:
    """Yield up to `n_tokens` token ids that follow `prompt`; stop after an end of document.

    An empty prompt starts a new document. Raises UserError for temperature < 0 or top_p outside
    (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"temperature must be at least 0 and top_p in (0, 1], not {temperature:g}, {top_p:g}"
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    tokens = torch.tensor([list(prompt) or [END_OF_DOCUMENT]], device=device)
    state = None
    for chunk in tokens.split(PROMPT_CHUNK, dim=1):
        hidden, state = model.hidden(chunk, state)
    for _ in range(n_tokens):
        logits = model.head(hidden[0, -1]).cpu()
        token = sample(logits, temperature, top_p, generator)
        yield token
        if token == END_OF_DOCUMENT:
            return
        hidden, state = model.hidden(torch.tensor([[token]], device=device), state)


@torch.no_grad()
def generate_batch(
    model: RWKV6, prompts: Sequence[Sequence[int]], n_tokens: int
) -> list[list[int]]:
    """Greedy completions of several prompts at once, without their end of document.

    The prompts advance in lockstep, one token a step: each is fed to its end, then continued.
    """
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    assert min(lengths) > 0
    completions: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    tokens, state = [prompt[0] for prompt in prompts], None
    for position in range(1, max(lengths) + n_tokens):
        logits, state = model(torch.tensor(tokens, device=device).unsqueeze(1), state)
        likeliest = logits[:, -1].argmax(dim=-1).tolist()
        for row, prompt in enumerate(prompts):
            if position < lengths[row]:
                tokens[row] = prompt[position]
                continue
            tokens[row] = likeliest[row]
            finished[row] |= tokens[row] == END_OF_DOCUMENT or len(completions[row]) == n_tokens
            if not finished[row]:
                completions[row].append(tokens[row])
        if all(finished):
            break
    return completions
