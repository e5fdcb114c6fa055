"""Write a corpus for recall over long contexts, seeded: one JSON object a line.

A record's `question` is a long text in which a few names are given numbers at its beginning, and
which asks for one of them at its end; `answer` is that number. Between them stand words without
meaning and distractors: names without a number, and numbers of things that are asked for nowhere.
"""

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path

from corpora import NAMES, THINGS, write_corpus

from finchtune.errors import UserError, run_cli

WORDS = "and the river runs by old stone walls under trees where quiet birds sleep at noon".split()


def recall(rng: random.Random, length: int, keys: int, distractors: float, digits: int) -> dict:
    """One record of about `length` characters; `distractors` is a share of the sentences."""
    names = rng.sample(NAMES, keys)
    numbers = [str(rng.randrange(10 ** (digits - 1), 10**digits)) for _ in names]
    asked = rng.randrange(keys)
    sentences = [f"{name} is {number}." for name, number in zip(names, numbers, strict=True)]
    question = f"What is {names[asked]}?"
    size = len(" ".join(sentences)) + len(question) + 1
    while size < length:
        if rng.random() < distractors:
            name, thing = rng.choice(NAMES), rng.choice(THINGS)
            number = rng.randrange(10**digits)
            sentence = rng.choice((f"{name} is out.", f"{number} {thing} are here."))
        else:
            sentence = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 6))) + "."
        sentences.append(sentence)
        size += len(sentence) + 1
    text = " ".join((*sentences, question))
    return {"question": text, "answer": numbers[asked], "length": len(text), "keys": keys}


def records(given: argparse.Namespace) -> Iterator[dict]:
    """Records without end, their lengths from --shortest to --length, as many at twice a length."""
    rng = random.Random(given.seed)
    spread = math.log(given.length / (given.shortest or given.length))
    while True:
        length = round(given.length / math.exp(rng.uniform(0, spread)))
        yield recall(rng, length, given.keys, given.distractors, given.digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, required=True, help="records to train on")
    parser.add_argument("--test", type=int, default=0, help="further records, held out")
    parser.add_argument("--length", type=int, default=4096, help="characters of a record")
    parser.add_argument("--shortest", type=int, help="of the shortest record; default all alike")
    parser.add_argument("--keys", type=int, default=3, help="names with a number")
    parser.add_argument("--digits", type=int, default=2, help="of a number")
    parser.add_argument("--distractors", type=float, default=0.2, help="share of the sentences")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, required=True, help="folder for the .jsonl files")
    given = parser.parse_args()
    if given.train < 1 or given.test < 0 or given.digits < 1:
        raise UserError("--train and --digits must be at least 1, and --test at least 0")
    if not 1 <= given.keys <= len(NAMES):
        raise UserError(f"--keys must be between 1 and {len(NAMES)}, not {given.keys}")
    if not 0 < (given.shortest or given.length) <= given.length:
        raise UserError("--shortest must be above 0 and at most --length")
    write_corpus(records(given), given.output, given.train, given.test)


if __name__ == "__main__":
    run_cli(main)
