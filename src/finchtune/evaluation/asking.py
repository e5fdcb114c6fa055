"""A model that is asked many questions at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finchtune.inference.engine import Engine, Request
from finchtune.inference.sampling import Sampling
from finchtune.inference.states import State
from finchtune.memory.measure import free_bytes
from finchtune.models import LanguageModel
from finchtune.tokenizer import Tokenizer

MAX_ROWS = {"cpu": 64, "cuda": 128}
PROMPT_TOKENS = 4096  # read in one call
MEMORY_SHARE = 0.5  # of what is free, for the rows
COPIES = 4  # of a row's state: held, joined, selected, and that of its prompt


@dataclass(frozen=True)
class Item:
    """One question to be answered once: the record's number in the file, and which sample it is."""

    index: int
    sample: int
    record: dict[str, Any]


@dataclass
class Wish:
    """A prompt to continue, and how."""

    prompt: str
    max_tokens: int
    stops: Sequence[str]
    temperature: float = 0.0
    seed: int = 0


class Asker:
    """Answers in batches of `max_rows`, as many as memory holds. `advance(n)` is told of progress.

    What all prompts begin with is read once.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        max_rows: int | None = None,
        advance: Callable[[int], object] = lambda n: None,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.advance = advance
        self.max_rows = max_rows or rows_that_fit(model)

    def write(self, wishes: Sequence[Wish]) -> list[str]:
        """What the model writes to each."""
        engine = Engine(self.model, self.tokenizer, self.max_rows, PROMPT_TOKENS)
        prompts = [self.tokenizer.encode(wish.prompt) for wish in wishes]
        n = common_length(prompts)
        state = self._state_after(engine, prompts[0][:n]) if n else None
        rows = [
            engine.submit(
                Request(
                    prompt[n:],
                    wish.max_tokens,
                    Sampling(wish.temperature, seed=wish.seed),
                    stop_strings=wish.stops,
                    state=state,
                )
            )
            for prompt, wish in zip(prompts, wishes, strict=True)
        ]
        while not engine.idle:
            self.advance(sum(row.finish_reason is not None for row, _ in engine.step()))
        return [row.text for row in rows]

    @staticmethod
    def _state_after(engine: Engine, prompt: Sequence[int]) -> State | None:
        row = engine.submit(Request(prompt, 1, keep_state=True))
        while not engine.idle:
            engine.step()
        return row.prompt_state


def common_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, less than any has; 0 for a single one."""
    if len(prompts) < 2:
        return 0
    # Between the first and the last in order are no others that differ earlier.
    first, last = min(prompts), max(prompts)
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    return max(min(same, *(len(prompt) - 1 for prompt in prompts)), 0)


def rows_that_fit(model: LanguageModel) -> int:
    """How many rows the free memory of the model's device holds, within limits."""
    parameter = next(model.parameters())
    device = parameter.device
    with torch.no_grad():
        _, state = model.advance(torch.zeros((1, 1), dtype=torch.int64, device=device), None)
    held = sum(part.numel() * part.element_size() for layer in state for part in layer)
    a_row = COPIES * held + 8 * model.config.vocab_size
    fitting = int(free_bytes(device) * MEMORY_SHARE) // a_row
    return max(1, min(fitting, MAX_ROWS[device.type]))
