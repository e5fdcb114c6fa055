"""The adapter methods by name. A new method is its own file and one entry here."""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from finchtune.adapters.base import Adapter
from finchtune.adapters.methods.bat import Bat
from finchtune.adapters.methods.biglora import BigLoRA
from finchtune.adapters.methods.bone import Bone
from finchtune.adapters.methods.disha import DiSHA
from finchtune.adapters.methods.dora import DoRA
from finchtune.adapters.methods.frozen_ft import FrozenFT
from finchtune.adapters.methods.lora import LoRA
from finchtune.adapters.methods.lora_ga import LoRAGA
from finchtune.adapters.methods.olora import OLoRA
from finchtune.adapters.methods.pissa import PiSSA
from finchtune.errors import UserError

METHODS: dict[str, type[Adapter]] = {
    method.name: method
    for method in (
        Bone,
        Bat,
        LoRA,
        PiSSA,
        OLoRA,
        DiSHA,
        DoRA,
        LoRAGA,
        FrozenFT,
        BigLoRA,
    )
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
