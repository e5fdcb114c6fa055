"""Flags that say of an adapter file what it does not say itself."""

import argparse
from typing import Any

from finchtune.config.flags import QUANT
from finchtune.methods import method_files

STATED: dict[str, tuple[str, dict[str, Any]]] = {
    "method": ("--method", {"choices": tuple(method_files())}),
    "alpha": ("--lora_alpha", {"type": float}),
    "rslora": ("--rslora", {"type": int, "choices": (0, 1)}),
    "mode": ("--bat_mode", {"choices": ("row", "col")}),
    "quant": ("--quant", {"choices": QUANT}),
}


def add_stated_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, for files without a record, as other software writes them."""
    group = parser.add_argument_group("only for adapter files without a record")
    for key, (flag, options) in STATED.items():
        group.add_argument(flag, dest=key, help="as in training", **options)
    group.add_argument("--lora_init", help="PiSSA: the file of the initial A and B")


def stated_of(given: argparse.Namespace) -> dict[str, Any]:
    """What those flags state, by the names in weights/stated.py."""
    found = {key: getattr(given, key) for key in STATED if getattr(given, key) is not None}
    return found | ({"rslora": bool(found["rslora"])} if "rslora" in found else {})
