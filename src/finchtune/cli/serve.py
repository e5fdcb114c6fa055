"""Offer a model, and adapters of it, to programs that speak OpenAI's API.

An adapter is chosen by its name in a request's `model`. Requests that come together are written
together. Needs pip install finchtune[serve].
"""

import argparse
import socket
from pathlib import Path
from typing import Any

from finchtune.cli.options import Parser
from finchtune.cli.writing import add_model_flags, check_counts, open_model, template_of
from finchtune.errors import UserError, printable

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
KEEP_ALIVE = 75  # seconds that a connection may idle; with few, clients meet closed ones


def main(arguments: list[str] | None = None) -> None:
    given = flags().parse_args(arguments)
    check_counts(
        max_rows=given.max_rows, max_tokens=given.max_tokens, max_waiting=given.max_waiting
    )
    names = adapter_names(given)
    try:
        import uvicorn

        from finchtune.inference.server import Worker, application
    except ImportError as error:
        raise UserError(
            f"finchtune serve needs {error.name}: pip install 'finchtune[serve]'"
        ) from error
    worker = Worker(open_models(given, names), max_waiting=given.max_waiting)
    hosts = [*LOOPBACK, given.host] if given.host in LOOPBACK else None
    app = application(worker, given.max_tokens, hosts)
    with listening(given.host, given.port) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        served = printable(", ".join(worker.served))
        print(f"{served} at http://{shown}:{port}/v1", flush=True)
        config = uvicorn.Config(
            app,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(config).run(sockets=[listener])


def flags() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument(
        "--peft_checkpoint",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="adapters' .pth files, unmerged; without a name, a file has its own",
    )
    parser.add_argument("--name", help="the base model's; its file's if not given")
    parser.add_argument(
        "--template",
        help="of chats: a name, or the path of a template; if not given the one that an adapter "
        "was trained with, else chat",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="0 = any that is free")
    parser.add_argument("--max_rows", type=int, default=64, help="texts of a model written at once")
    parser.add_argument("--max_waiting", type=int, default=1024, help="texts asked for at once")
    parser.add_argument("--max_tokens", type=int, default=4096, help="most tokens of a text")
    return parser


def adapter_names(given: argparse.Namespace) -> dict[str, str]:
    """Name -> file of every adapter; UserError where two models have the same name."""
    pairs = []
    for word in given.peft_checkpoint:
        name, equals, path = word.partition("=")
        pairs.append((name, path) if equals else (Path(word).stem, word))
    names = [base_name(given), *(name for name, _ in pairs)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name}; give names, as in NAME=FILE")
    return dict(pairs)


def base_name(given: argparse.Namespace) -> str:
    return given.name or Path(given.model).stem


def open_models(given: argparse.Namespace, adapters: dict[str, str]) -> dict[str, Any]:
    """Every model by its name, the base first, with the base's weights in memory once."""
    from finchtune.inference.server import Served
    from finchtune.weights.writing import share_weights

    served = {}
    base = None
    for name, path in {base_name(given): None, **adapters}.items():
        own = argparse.Namespace(**vars(given) | {"peft_checkpoint": path})
        model, tokenizer = open_model(own)
        if base is None:
            base = model
        else:
            share_weights(model, base)
        served[name] = Served(model, tokenizer, template_of(own), given.max_rows)
    return served


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; UserError where it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host}:{port}: {error}") from error
