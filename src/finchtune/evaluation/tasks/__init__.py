"""The tasks by name. A new one is a file here, named as the task, with its class."""

import pkgutil
from importlib import import_module

from finchtune.evaluation.task import Task


def load_task(name: str) -> type[Task]:
    """The task that a file here defines."""
    module = import_module(f"{__name__}.{name}")
    own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Task)]
    (task,) = (c for c in own if c.__module__ == module.__name__)
    return task


TASKS = {name: load_task(name) for _, name, _ in pkgutil.iter_modules(__path__)}
