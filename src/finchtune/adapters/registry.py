"""The adapter methods by name. A new method is a file in methods/, and nothing else."""

import difflib
import inspect
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from finchtune.adapters.base import Adapter
from finchtune.errors import UserError
from finchtune.methods import method_files


def load_method(name: str, module: str) -> type[Adapter]:
    """The class of this name in a file of methods/."""
    classes = vars(import_module(f"finchtune.adapters.methods.{module}")).values()
    own = [c for c in classes if isinstance(c, type) and vars(c).get("name") == name]
    assert len(own) == 1, f"{module} has {len(own)} classes named {name}"
    assert issubclass(own[0], Adapter), f"{name} is no Adapter"
    return own[0]


METHODS: dict[str, type[Adapter]] = {
    name: load_method(name, file.module) for name, file in method_files().items()
}


def get_method(name: str) -> type[Adapter]:
    """The class of a method; an unknown name raises UserError."""
    if name not in METHODS:
        raise UserError(f"no adapter method {name!r}{known(name, METHODS)}")
    return METHODS[name]


def hyperparameters_of(method: type[Adapter]) -> dict[str, Any]:
    """A method's hyperparameters and their defaults."""
    parameters = inspect.signature(method.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def resolve(method: type[Adapter], given: dict[str, Any]) -> dict[str, Any]:
    """Every hyperparameter of a method: what was given, else its default.

    Raises UserError for one that the method does not have.
    """
    defaults = hyperparameters_of(method)
    for name in given:
        if name not in defaults:
            hint = known(name, defaults)
            raise UserError(f"{method.name} has no hyperparameter {name!r}{hint}")
    return defaults | given


def known(name: str, names: Iterable[str]) -> str:
    """The rest of an error message: the name probably meant, and all that exist."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    guess = f"; did you mean {nearest[0]!r}?" if nearest else ";"
    return f"{guess} known: {', '.join(names)}"
