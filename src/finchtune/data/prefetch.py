"""Reading ahead in a background thread."""

import atexit
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The same items in the same order, up to `depth` of them made ahead of their use.

    What `items` raises is raised here, in its turn. The thread ends with the iterator: at the
    end, at `close()`, or when the iterator is dropped; at the latest before the interpreter does.
    """
    # Items come as (True, item); the last entry is (False, the error or None).
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(more: bool, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((more, value), timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            if all(put(True, item) for item in items):
                put(False, None)
        except BaseException as error:
            put(False, error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()

    # A traceback may hold the iterator. The end of the interpreter aborts the process where it
    # finds a thread within torch.
    atexit.register(end)
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        atexit.unregister(end)
        end()
