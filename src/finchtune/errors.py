"""A user's mistake, told in one line."""

import errno
import io
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import NoReturn

# Exit statuses of train.py, besides 0 (done) and 1 (a fault of finchtune, with its traceback).
USER_ERROR = 2
NOT_FINITE = 3
OUT_OF_MEMORY = 4
LOST_RANK = 5
INTERRUPTED = 75  # sysexits.h: a temporary failure, try again
ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)`")
REFUSALS = {
    "can't start new thread": "the system starts no more threads: raise the limits of processes "
    "and of memory (ulimit -u, -v)",
    "Too many open files": "too many open files: raise the limit (ulimit -n)",
}
"""What libraries say where the system refuses, and hide its own error."""
PLAIN = "\n\t"  # the control characters that a terminal may get


def printable(text: str) -> str:
    """The text with control characters, which could command a terminal, as \\x1b and the like.

    Names of files and tensors and what a model writes come from others.
    """
    return "".join(
        char
        if char in PLAIN or unicodedata.category(char) not in ("Cc", "Cs")
        else ascii(char)[1:-1]
        for char in text
    )


class UserError(ValueError):
    """Something the user can mend. The message is one line: what, where, what to do.

    It names arguments in backquotes, as `ctx_len`, which the command line shows as --ctx_len.
    """

    status = USER_ERROR

    @property
    def line(self) -> str:
        """The message, on one line."""
        return printable(" ".join(str(self).split()))

    @property
    def lines(self) -> list[str]:
        """What is printed: a line for each mistake."""
        return [self.line]

    @property
    def subject(self) -> str:
        """What two ranks' errors have in common if they are the same one."""
        return self.line


class ConfigurationError(UserError):
    """Values that make no sense, or not together: one message for each mistake."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("; ".join(mistakes))
        self.mistakes = mistakes

    @property
    def lines(self) -> list[str]:
        return [printable(" ".join(mistake.split())) for mistake in self.mistakes]


class DataError(UserError):
    """A data file that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint, or a file of weights, that cannot be used."""


class NotFinite(UserError):
    """The loss or the gradient was NaN or infinite too often."""

    status = NOT_FINITE


class OutOfMemory(UserError):
    """The machine or the GPU has no memory left."""

    status = OUT_OF_MEMORY
    subject = "out of memory"  # whatever each rank had used and asked for


class LostRank(UserError):
    """Another process of the run died or hangs."""

    status = LOST_RANK


def with_flags(message: str) -> str:
    """The message with arguments, as `ctx_len`, written as the flags that give them."""
    return ARGUMENT.sub(r"--\1", message)


def print_error(error: UserError) -> None:
    """Print it on stderr, with arguments as flags."""
    lines = "".join(f"error: {with_flags(line)}\n" for line in error.lines)
    print(lines, end="", file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host; torch has exceptions of its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in said)


def from_system(error: Exception) -> UserError | None:
    """What the system's refusal means to the user; None for an exception of another kind."""
    if is_out_of_memory(error):
        return OutOfMemory(f"out of memory: {error or 'the machine has none left'}")
    for said, meaning in REFUSALS.items():
        if isinstance(error, RuntimeError) and said in str(error):
            return UserError(meaning)
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename is not None else ""
        return UserError(f"{where}{error.strerror or error}")
    if isinstance(error, UnicodeEncodeError):  # half a character, out of JSON or YAML
        return UserError(f"{error.object[:60]!a} is no text that a file can be named")
    return None


def run_cli(
    main: Callable[[], int | None], report: Callable[[UserError], None] = print_error
) -> NoReturn:
    """Run a command's `main`; a UserError becomes one line on stderr and its exit status.

    So does what the system refuses: a file, memory, a full disk. Anything else is a fault of
    finchtune itself and keeps its traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, for the process's life
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever characters the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        drop_output()
        sys.exit(0)
    except UserError as error:
        report(error)
        sys.exit(error.status)
    except Exception as error:
        told = from_system(error)
        if told is None:
            raise
        drop_output()
        report(told)
        sys.exit(told.status)
    sys.exit(status or 0)


def drop_output() -> None:
    """Send what standard output still holds nowhere: it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
