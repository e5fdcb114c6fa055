"""Talk with a model: many turns, in the template that it was trained with."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, suppress

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
from finchtune.errors import UserError, print_error, printable
from finchtune.files import read_json, write_json
from finchtune.inference.conversation import Conversation
from finchtune.inference.engine import Engine

COMMANDS = """/retry       answer the last question again
/reset       begin anew
/save FILE   write the conversation to a file
/load FILE   continue from one
/help        show this
/exit        leave, as Ctrl-D does; Ctrl-C ends an answer"""


def main(arguments: list[str] | None = None) -> None:
    given = flags().parse_args(arguments)
    check_counts(tokens=given.tokens)
    sampling, template = sampling_of(given), template_of(given)
    model, tokenizer = open_model(given)
    engine = Engine(model, tokenizer, max_rows=1)
    conversation = Conversation(engine, template, sampling, given.tokens, given.system)
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited and found again
        print(COMMANDS, flush=True)
    for line in lines():
        if line == "/exit":
            return
        try:
            respond(conversation, line)
        except UserError as error:
            print_error(error)


def flags() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__, epilog=COMMANDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    add_adapter_flag(parser)
    parser.add_argument(
        "--template",
        help="a name, or the path of a template; if not given the one that the adapter was "
        "trained with, else chat",
    )
    parser.add_argument("--system", default="", help="what the model is told first")
    parser.add_argument("--tokens", type=int, default=1000, help="most tokens of an answer")
    add_sampling_flags(parser, temperature=1.0, top_p=0.5)
    return parser


def lines() -> Iterator[str]:
    """What the user enters, until the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def respond(conversation: Conversation, line: str) -> None:
    """Do a command, or put a question and print the answer."""
    command, _, path = line.partition(" ")
    path = path.strip()
    if command in ("/save", "/load") and not path:
        raise UserError(f"{command} needs the name of a file")
    if command == "/save":
        write_json(path, conversation.record())
        print(f"saved to {path}", flush=True)
    elif command == "/load":
        conversation.restore(read_json(path), path)
        print(f"{len(conversation.messages)} messages from {path}", flush=True)
    elif command == "/reset":
        conversation.reset()
        print("a new conversation", flush=True)
    elif command == "/help":
        print(COMMANDS, flush=True)
    elif command == "/retry":
        print_answer(conversation.retry())
    elif command.startswith("/") and command.count("/") == 1:
        raise UserError(f"there is no command {command}; /help shows them")
    else:
        print_answer(conversation.ask(line))


def print_answer(answer: Iterator[str]) -> None:
    """Print an answer as it is written; Ctrl-C ends it, and it stays as far as it got."""
    with closing(answer), suppress(KeyboardInterrupt):  # type: ignore[type-var]  # a generator
        for text in answer:
            print(printable(text), end="", flush=True)
    print(flush=True)
