"""A JSON value -> text, or the reason why it is none."""

import json
from typing import Any


class BadRecord(ValueError):
    """Why a record cannot become a document."""


class Number(float):
    """A number that remembers how it was written."""

    written: str

    def __new__(cls, written: str) -> "Number":
        number = super().__new__(cls, written)
        number.written = written
        return number


def text_of(record: dict[str, Any], name: str) -> str:
    """The text in a record's field; numbers and truth values as JSON writes them.

    BadRecord for a field that is missing or no text.
    """
    if name not in record:
        have = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        raise BadRecord(f"there is no field {name!r}; the fields are {have}")
    value = record[name]
    if isinstance(value, str):
        return value
    if isinstance(value, Number):
        return value.written
    if isinstance(value, bool | int | float) and value == value:  # NaN, of a table, is no text
        return json.dumps(value)
    remedy = "; choose one of its values, or join them" if isinstance(value, list) else ""
    raise BadRecord(f"the field {name!r} must be a string, but it is {kind(value)}{remedy}")


def kind(value: Any) -> str:
    """A JSON value's type, in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    if value == [] or value == "":
        return f"an empty {'list' if value == [] else 'string'}"
    return names.get(type(value), "a number")
