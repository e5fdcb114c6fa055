"""A user's mistake, told in one line."""

import sys
from collections.abc import Callable
from typing import NoReturn

# Exit statuses of train.py, besides 0 (done) and 1 (a fault of finchtune, with its traceback).
USER_ERROR = 2
NOT_FINITE = 3
OUT_OF_MEMORY = 4
LOST_RANK = 5
INTERRUPTED = 75  # sysexits.h: a temporary failure, try again


class UserError(ValueError):
    """Something the user can mend. The message is one line: what, where, what to do."""

    status = USER_ERROR

    @property
    def line(self) -> str:
        """The message, on one line."""
        return " ".join(str(self).split())

    @property
    def subject(self) -> str:
        """What two ranks' errors have in common if they are the same one."""
        return self.line


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


def print_error(error: UserError) -> None:
    print(f"error: {error.line}", file=sys.stderr, flush=True)


def run_cli(
    main: Callable[[], int | None], report: Callable[[UserError], None] = print_error
) -> NoReturn:
    """Run a command's `main`; a UserError becomes one line on stderr and its exit status.

    Anything else is a fault of finchtune itself and keeps its traceback.
    """
    try:
        status = main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        report(error)
        sys.exit(error.status)
    sys.exit(status or 0)
