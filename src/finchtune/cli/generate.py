"""Continue a prompt with a model, streaming, or many prompts from a file at once."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finchtune.cli.options import Parser
from finchtune.cli.writing import (
    add_adapter_flag,
    add_model_flags,
    add_sampling_flags,
    check_counts,
    open_model,
    sampling_of,
    template_of,
)
from finchtune.data.records import parse_line
from finchtune.data.templates import Template
from finchtune.errors import UserError, printable
from finchtune.inference.engine import Engine, Request, Row


def main(arguments: list[str] | None = None) -> None:
    given = flags().parse_args(arguments)
    check_counts(tokens=given.tokens, batch=given.batch)
    sampling, template = sampling_of(given), template_of(given, default="metamath")
    prompts = read_prompts(given, template)
    model, tokenizer = open_model(given)
    engine = Engine(model, tokenizer, max_rows=given.batch)
    rows = [
        engine.submit(
            Request(
                tokenizer.encode(text),
                given.tokens,
                sampling,
                stop_strings=[*given.stop, *stop_strings],
            )
        )
        for text, stop_strings in prompts
    ]
    if given.prompts:
        write_lines(engine, rows, [text for text, _ in prompts])
    else:
        stream(engine, rows[0], prompts[0][0])


def flags() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    add_adapter_flag(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="text to continue")
    asked.add_argument("--question", help="put as the template puts it")
    asked.add_argument(
        "--prompts",
        metavar="FILE",
        help="a .jsonl of objects with `prompt` or `question`; prints one for each, with its "
        "`completion`, in the same order",
    )
    parser.add_argument(
        "--template",
        help="of questions: a name, or the path of a template; if not given the one that the "
        "adapter was trained with, else metamath",
    )
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to write")
    parser.add_argument("--stop", nargs="+", default=[], help="texts that end the writing")
    parser.add_argument("--batch", type=int, default=16, help="prompts of a file written at once")
    add_sampling_flags(parser, temperature=1.0, top_p=0.7)
    return parser


Prompt = tuple[str, tuple[str, ...]]
"""The text to continue, and the strings that end the writing."""


def read_prompts(given: argparse.Namespace, template: Template) -> list[Prompt]:
    """What to continue. UserError for a file without any prompt."""
    if given.prompt is not None:
        return [(given.prompt, ())]
    if given.question is not None:
        return [(template.prompt(given.question), template.stop)]
    try:
        lines = Path(given.prompts).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--prompts {given.prompts}: {error.strerror}") from error
    prompts = [
        prompt_of(line, f"{given.prompts}:{number}", template)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise UserError(f"--prompts {given.prompts}: holds no prompts")
    return prompts


def prompt_of(line: bytes, where: str, template: Template) -> Prompt:
    """What to continue of one line of a file."""
    try:
        record: Any = parse_line(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    record = record if isinstance(record, dict) else {}
    if isinstance(record.get("prompt"), str):
        return record["prompt"], ()
    if isinstance(record.get("question"), str):
        return template.prompt(record["question"]), template.stop
    raise UserError(f"{where}: an object with a string 'prompt' or 'question' is needed")


def stream(engine: Engine, row: Row, prompt: str) -> None:
    """Print the prompt and what follows it, as it is written."""
    print(printable(prompt), end="", flush=True)
    while not engine.idle:
        for _, text in engine.step():
            print(printable(text), end="", flush=True)
    print(flush=True)


def write_lines(engine: Engine, rows: list[Row], prompts: list[str]) -> None:
    """Print every prompt and completion as a line of JSON, in order, each as soon as it is done."""
    for row, prompt in zip(finished(engine, rows), prompts, strict=True):
        result = {
            "prompt": prompt,
            "completion": row.text,
            "finish_reason": row.finish_reason,
        }
        print(json.dumps(result), flush=True)


def finished(engine: Engine, rows: list[Row]) -> Iterator[Row]:
    """The rows in order, each when it is finished."""
    for row in rows:
        while row.finish_reason is None:
            engine.step()
        yield row
