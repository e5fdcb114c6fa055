"""Exact match of final answers: greedy completions of questions against the expected number."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finchtune.inference.generate import generate_batch
from finchtune.models import LanguageModel
from finchtune.tokenizer import Tokenizer

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Answer:
    """One question, what the model wrote, and whether its final number is the expected one."""

    prompt: str
    completion: str
    expected: str
    correct: bool


def final_number(text: str) -> str | None:
    """The last number in a text, without thousands separators; None if there is none."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def exact_match(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[tuple[str, str]],
    n_tokens: int = 256,
    batch: int = 64,
) -> Iterator[Answer]:
    """Answer (prompt, expected answer) pairs greedily, `batch` at a time.

    A completion ends at the end of its document or after `n_tokens`.
    """
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        prompts = [tokenizer.encode(prompt) for prompt, _ in part]
        completions = generate_batch(model, prompts, n_tokens)
        for (prompt, expected), ids in zip(part, completions, strict=True):
            text = tokenizer.decode(ids)
            wanted = final_number(expected)
            correct = wanted is not None and final_number(text) == wanted
            yield Answer(prompt, text, expected, correct)
