"""A word of the command line, or a value of a YAML file -> the value of a flag."""

import dataclasses
import difflib
import json
import types
from typing import Any, get_args, get_origin

from finchtune.config import as_words
from finchtune.errors import UserError

LIST_HINT = "words, or a JSON list"
NEARLY = {
    ("quant", "4bit"): "nf4 and fp4 have 4 bits; in bitsandbytes 4bit is fp4",
    ("train_type", "state,infctx"): "several stand with a space between them: state infctx",
    ("loss_mask", "se"): "for other marks than Assistant: and User: give --sft_field, or write the "
    "mask with prepare_data.py",
}


def is_list(field: dataclasses.Field[Any]) -> bool:
    """Whether a flag takes several words."""
    return get_origin(field.type) is list


def type_of(field: dataclasses.Field[Any]) -> Any:
    """The type of a flag's value, None aside."""
    kind: Any = field.type
    if isinstance(kind, types.UnionType):
        kind = next(option for option in get_args(kind) if option is not type(None))
    return kind


def convert(field: dataclasses.Field[Any], value: Any) -> Any:
    """A word (or words) -> the field's type. Raises UserError for one that does not fit."""
    name = field.name
    if is_list(field):
        choices = field.metadata["choices"]
        words = convert_list(name, as_words(value) if choices else value)
        for word in words:
            check_choice(name, word, choices)
        return words
    kind = type_of(field)
    if kind is bool:
        return convert_bool(name, value)
    if name == "micro_bsz":
        if value == "auto":
            return 0  # resolved when the device is known
        if str(value) == "0":
            raise UserError("--micro_bsz must be at least 1, or auto, not 0")
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        converted = kind(value)
    except (ValueError, TypeError) as error:
        what = {int: "a whole number", float: "a number", str: "a word"}[kind]
        raise UserError(f"--{name} takes {what}, not {value!r}") from error
    check_choice(name, converted, choices_of(field))
    return converted


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The values that a flag takes, if they are few."""
    if field.name == "my_testing":
        from finchtune.models import generations  # needs torch, which --help does not

        return tuple(generations())
    return field.metadata["choices"]


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise UserError unless a value is one of those that there are."""
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        hint = f"; {NEARLY[name, value]}" if (name, value) in NEARLY else hint
        raise UserError(f"--{name} {value}: choose one of {', '.join(choices)}{hint}")


def convert_bool(name: str, value: Any) -> bool:
    """0, 1, true or false."""
    if str(value).lower() not in ("0", "1", "true", "false"):
        raise UserError(f"--{name} takes 0 or 1, not {value!r}")
    return str(value).lower() in ("1", "true")


def convert_list(name: str, words: Any) -> list[str]:
    """`a b`, `["a", "b"]` and `[]` -> a list of strings."""
    found = words
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        text = " ".join(words)
        if not text.startswith("["):
            return words
        try:
            found = json.loads(text)
        except ValueError:
            found = None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise UserError(f'--{name} takes {LIST_HINT} such as ["time", "ln"], not {words!r}')
    return found
