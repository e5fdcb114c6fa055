"""Exact match of a model's final answers on questions with known answers."""

import argparse
import json

import torch
from tqdm import tqdm

from finchtune.data import PROMPT
from finchtune.data.records import parse_line
from finchtune.errors import UserError
from finchtune.evaluation import exact_match
from finchtune.files import atomic_path
from finchtune.tokenizer import load_tokenizer
from finchtune.weights.base import load_model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="weights, a plain .pth")
    parser.add_argument("--questions", required=True, help=".jsonl with the fields below")
    parser.add_argument("--fields", nargs=2, default=["question", "answer"])
    parser.add_argument(
        "--prompt", default=PROMPT, help="text to continue; {question} stands for the question"
    )
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--tokenizer", help="world, bytes or a tokenizer.json")
    parser.add_argument("--output", help="write every answer to this .jsonl")
    given = parser.parse_args(arguments)
    if not given.prompt:
        raise UserError("--prompt must hold some text to continue")
    if given.limit is not None and given.limit < 1:
        raise UserError(f"--limit must be at least 1, not {given.limit}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(given.model, torch.float32 if device == "cpu" else None, device)
    tokenizer = load_tokenizer(given.tokenizer, model.config.vocab_size)
    questions = read_questions(given.questions, given.fields, given.prompt)[: given.limit]
    answers = list(
        tqdm(
            exact_match(model, tokenizer, questions, given.tokens),
            total=len(questions),
            leave=False,
        )
    )
    if given.output:
        with atomic_path(given.output) as path, path.open("w") as file:
            file.writelines(json.dumps(vars(answer)) + "\n" for answer in answers)
    correct = sum(answer.correct for answer in answers)
    print(f"{given.model}: {correct} of {len(answers)} right, {correct / len(answers):.1%}")


def read_questions(path: str, fields: list[str], prompt: str) -> list[tuple[str, str]]:
    """(prompt, expected answer) pairs of a .jsonl file."""
    question, answer = fields
    pairs = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                row = parse_line(line)
                pairs.append((prompt.replace("{question}", row[question]), row[answer]))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not an object with {question!r} and {answer!r}") from error
    if not pairs:
        raise UserError(f"{path}: holds no questions")
    return pairs
