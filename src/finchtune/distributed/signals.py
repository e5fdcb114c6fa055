"""SIGTERM and SIGINT: the first asks for a stop after this step, a second ends the process."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

STOPPING = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 2.0  # terminal and launcher may both deliver one Ctrl-C


class StopRequest:
    """Whether SIGTERM or SIGINT has come: true in a condition from then on.

    Also once `launcher_ended` is true, for a launcher that ends without sending a signal here.

    A thread hears of them at once, also while the main thread waits in a collective call, where
    Python's own handlers would not run: a second signal must end a process that hangs there.
    """

    def __init__(self, launcher_ended: Callable[[], bool] = lambda: False) -> None:
        self._received, self._launcher_ended = False, launcher_ended
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in STOPPING:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def __bool__(self) -> bool:
        return self._received or self._launcher_ended()

    def _listen(self) -> None:
        first = 0.0
        while True:
            number = os.read(self._reader, 1)[0]
            if number not in STOPPING:
                continue
            if not self._received:
                self._received, first = True, time.monotonic()
                name = signal.Signals(number).name
                print(f"{name}: stopping after this step; once more to stop at once",
                      file=sys.stderr, flush=True)  # fmt: skip
            elif time.monotonic() - first > SAME_SECONDS:
                os._exit(128 + number)
