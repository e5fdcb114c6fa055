"""The `finchtune` command: a verb for everything that there is to do."""

import atexit
import difflib
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import finchtune
from finchtune import distributed
from finchtune.errors import UserError, print_error, run_cli

VERBS = {
    "init": "write a new, untrained model",
    "prepare": "tokenise text for training",
    "inspect": "check tokenised text and show what is in it",
    "train": "fine-tune a model, or train it from scratch",
    "plan": "what a training run will take of memory, steps and disk",
    "report": "lay training runs side by side in one HTML page",
    "merge": "merge an adapter into its base model's weights",
    "unmerge": "take an adapter off merged weights again",
    "convert": "convert an adapter to the form of Hugging Face's peft, or back",
    "export": "write a model or an adapter in the form of another runtime",
    "info": "tell what a file or folder of weights is",
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "serve": "offer a model to programs that speak OpenAI's API",
    "evaluate": "score a model's answers",
}
"""Each is the module of this name here: its `main(arguments)` returns an exit status or None, and
its `report_error`, where it has one, prints a UserError."""

SPIN_COUNT = "1000"


def main() -> None:
    """The installed command: the first argument is the verb."""
    verb = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if verb in VERBS:
        sys.argv[0] = f"finchtune {verb}"  # for usage lines
        run(verb)
    if verb == "--version":
        run_cli(lambda: print(f"finchtune {finchtune.__version__}"))
    run_cli(print_help if verb in ("-h", "--help") else lambda: refuse(verb))


def print_help() -> None:
    """What there is to do."""
    print(f"usage: finchtune VERB ...\n\n{__doc__}\n")
    print("\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items()))
    print("\nfinchtune VERB --help tells more of one.")


def refuse(verb: str) -> None:
    """Raise the UserError of an unknown verb."""
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
    raise UserError(f"finchtune knows no {verb!r}; {hint}")


def run(verb: str, **options: Any) -> NoReturn:
    """Run a verb on the command line's arguments and end the process with its exit status."""
    share_the_cores()
    statuses: list[int] = []
    atexit.register(end_at_once, statuses)  # what is registered first is called last
    module = import_module(f"finchtune.cli.{verb}")
    report = getattr(module, "report_error", print_error)
    try:
        run_cli(lambda: module.main(sys.argv[1:], **options), report)
    except BaseException as end:
        status = end.code if isinstance(end, SystemExit) else 1
        if distributed.launched() and isinstance(status, int):
            statuses.append(status)
        raise


def end_at_once(statuses: list[int]) -> None:
    """End the process without C++'s own clearing up, if there is a status to end it with.

    DeepSpeed holds on to process groups, so that gloo's threads run until the end. Where C++ clears
    up under them, while other ranks hang up, a rank that is done may still abort.
    """
    if statuses:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(statuses[0])


def share_the_cores() -> None:
    """Have OpenMP's threads give up their cores soon where they wait for each other.

    GCC's OpenMP otherwise spins for so long that two programs on the same cores take ten times as
    long as one after the other. What the user has set stays. Before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
