"""Write a corpus of worked arithmetic word problems, seeded: one JSON object a line.

Each has `question`, `answer` (the working, then `The answer is N.`), and `text`, the two joined.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from corpora import NAMES, THINGS, write_corpus

from finchtune.errors import UserError, run_cli

GAINS = "finds buys gets".split()
LOSSES = "loses sells eats".split()


def add(rng: random.Random) -> tuple[str, str, int]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    name, thing, gain = rng.choice(NAMES), rng.choice(THINGS), rng.choice(GAINS)
    question = f"{name} has {a} {thing} and {gain} {b} more. How many {thing} now?"
    return question, f"{a} + {b} = {a + b}.", a + b


def subtract(rng: random.Random) -> tuple[str, str, int]:
    a = rng.randint(2, 18)
    b = rng.randint(max(1, a - 9), min(9, a - 1))
    name, thing, lose = rng.choice(NAMES), rng.choice(THINGS), rng.choice(LOSSES)
    question = f"{name} has {a} {thing} and {lose} {b}. How many {thing} now?"
    return question, f"{a} - {b} = {a - b}.", a - b


def total(rng: random.Random) -> tuple[str, str, int]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    (first, second), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    question = f"{first} has {a} {thing}. {second} has {b} {thing}. How many together?"
    return question, f"{a} + {b} = {a + b}.", a + b


def two_steps(rng: random.Random) -> tuple[str, str, int]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    c = rng.randint(max(1, a + b - 9), min(9, a + b - 1))
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    gain, lose = rng.choice(GAINS), rng.choice(LOSSES)
    question = f"{name} has {a} {thing}, {gain} {b} more and {lose} {c}. How many {thing} now?"
    return question, f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.", a + b - c


SKILLS: dict[str, Callable[[random.Random], tuple[str, str, int]]] = {
    "add": add,
    "subtract": subtract,
    "total": total,
    "two_steps": two_steps,
}


def problems(skills: list[str], seed: int) -> Iterator[dict[str, str]]:
    """Problems without end, no question twice, the skills in turn at random."""
    rng, seen = random.Random(seed), set()
    while True:
        question, working, result = SKILLS[rng.choice(skills)](rng)
        if question not in seen:
            seen.add(question)
            answer = f"{working} The answer is {result}."
            yield {
                "question": question,
                "answer": answer,
                "text": f"User: {question}\n\nAssistant: {answer}",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skills", nargs="+", choices=SKILLS, required=True)
    parser.add_argument("--train", type=int, required=True, help="problems to train on")
    parser.add_argument("--test", type=int, default=0, help="further problems, held out")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, required=True, help="folder for the .jsonl files")
    given = parser.parse_args()
    if given.train < 1 or given.test < 0:
        raise UserError("--train must be at least 1 and --test at least 0")
    write_corpus(problems(given.skills, given.seed), given.output, given.train, given.test)


if __name__ == "__main__":
    run_cli(main)
