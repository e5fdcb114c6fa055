"""A user's mistake, told in one line."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend. The message is one line: what, where, what to do."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command's `main`; a UserError becomes one line on stderr and exit status 2.

    Anything else is a fault of finchtune itself and keeps its traceback.
    """
    try:
        status = main()
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status or 0)
