"""Score a model's answers, or given ones, on GSM8K, MATH, HumanEval, MBPP and data of one's own."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finchtune.cli.options import Parser
from finchtune.cli.stated import stated_of
from finchtune.cli.writing import (
    add_adapter_flag,
    add_model_flags,
    check_counts,
    chosen_template,
    open_model,
)
from finchtune.errors import UserError
from finchtune.evaluation.runner import Asked, Given, evaluate, read_answers, read_items
from finchtune.evaluation.task import Choices
from finchtune.evaluation.tasks import TASKS
from finchtune.weights.hashing import weights_sha256


def main(arguments: list[str] | None = None) -> None:
    given = flags().parse_args(arguments)
    check_counts(limit=given.limit, tokens=given.tokens, samples=given.samples)
    if given.shots < 0 or given.temperature < 0:
        raise UserError("--shots and --temperature must be at least 0")
    if (given.model is None) == (given.answers is None):
        raise UserError("give either --model, to be asked, or --answers, to be scored")
    if given.samples > 1 and given.temperature == 0 and given.model:
        raise UserError("--samples needs a --temperature above 0: greedy answers are all the same")
    choices = Choices(
        given.strict_parity,
        chosen_template(given),
        given.tokens,
        given.fields and tuple(given.fields),
        given.samples,
        given.temperature,
        given=given.answers is not None,
    )
    task = TASKS[given.task](choices)
    items = read_items(task, given.data, given.shots, given.limit)
    completions = read_answers(task, given.answers, items) if given.answers else []
    task.require()
    source = Given(completions, items) if given.answers else Asked(lambda: open_model(given))
    summary = evaluate(task, items, source, Path(given.output), identity_of(given, choices))
    print(f"{given.task}, {name_of(given)}: {task.line(summary)}")


def flags() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--data", required=True, help="the questions, a .jsonl, .jsonl.gz, ...")
    parser.add_argument(
        "--output", required=True, help="folder of answers.jsonl and summary.json; resumed if begun"
    )
    add_model_flags(parser, required=False)
    add_adapter_flag(parser)
    parser.add_argument(
        "--answers", help="a .jsonl with a `completion` for each question, to score without a model"
    )
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument(
        "--shots",
        type=int,
        default=0,
        help="show the first so many questions of the file with their answers, and ask the others",
    )
    parser.add_argument(
        "--strict_parity",
        action="store_true",
        help="stop and score exactly as the paper's evaluation, with its known faults",
    )
    parser.add_argument(
        "--template",
        help="a name, or the path of a template; if not given, the one that the adapter was "
        "trained with, else the task's",
    )
    parser.add_argument("--fields", nargs="+", help="the record's, instead of the task's")
    parser.add_argument("--tokens", type=int, help="most tokens of an answer")
    parser.add_argument(
        "--samples", type=int, default=1, help="answers to each problem, for pass@k"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    return parser


def identity_of(given: argparse.Namespace, choices: Choices) -> dict[str, Any]:
    """What the answers depend on: a folder is of one evaluation only."""
    names = ("data", "model", "peft_checkpoint", "lora_init", "state", "answers")
    files = {name: getattr(given, name) for name in names}
    kept = ("limit", "shots", "tokenizer", "device", "dtype")
    settings = asdict(choices) | {name: getattr(given, name) for name in kept}
    settings["template"] = choices.template and choices.template.record()
    settings["fields"] = given.fields
    settings["stated"] = stated_of(given)
    hashes = {f"{name}_sha256": path and sha256_of(path) for name, path in files.items()}
    return {"task": given.task, "model": name_of(given), **settings, **hashes}


def sha256_of(path: str) -> str:
    try:
        return weights_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def name_of(given: argparse.Namespace) -> str:
    """What to call whoever gave the answers."""
    return Path(given.peft_checkpoint or given.model or given.answers).stem
