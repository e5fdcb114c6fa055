"""A JSON line -> a record, or the reason why it is none."""

import json
import re
from collections import Counter
from typing import Any

import numpy as np

from finchtune.data.values import BadRecord, Number
from finchtune.errors import DataError, UserError

BOM = b"\xef\xbb\xbf"
MAX_REASON = 300
MAX_DEPTH = 200
STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')


class NotUTF8(BadRecord):
    """A line in another encoding."""


class Findings:
    """What was met among records. Of bad ones, `fail` stops at the first, and `skip` counts them.

    `templated`: some document was made by a template. `unknown`: characters without a token.
    """

    def __init__(self, policy: str = "fail"):
        if policy not in ("fail", "skip"):
            raise UserError(f"`on_bad` {policy}: choose fail or skip")
        self.policy = policy
        self.count = 0
        self.first = ""
        self.templated = False
        self.unknown: Counter[str] = Counter()

    def add(self, where: str, reason: str) -> None:
        """Count a bad record; UserError under `fail`."""
        message = f"{where}: {reason if len(reason) <= MAX_REASON else reason[:MAX_REASON] + '...'}"
        if self.policy == "fail":
            raise DataError(f"{message} (`on_bad` skip leaves such records out)")
        self.first = self.first or message
        self.count += 1


def parse_line(line: bytes) -> Any:
    """One JSON value; BadRecord with the reason. Stricter than `json`: no NaN, no repeated key."""
    record = _parse_flat(line)
    return _parse_strictly(line) if record is None else record


def _parse_flat(line: bytes) -> dict[str, Any] | None:
    """A plain object of strings and whole numbers, by a fast parser; None for all else.

    The fast parser keeps the last of two equal keys. There are none if the line has just the quotes
    around its keys and strings and those within them: a key that was dropped would have two more.
    """
    import orjson

    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if type(record) is not dict:
        return None
    expected = 0
    for key, value in record.items():
        kind = type(value)
        if kind is dict or kind is list or kind is float:
            return None
        expected += 2 + key.count('"') + (2 + value.count('"') if kind is str else 0)
    # A quote that is written as a number would make up for one that is not there.
    return record if line.count(b'"') == expected and rb"\u0022" not in line else None


def _parse_strictly(line: bytes) -> Any:
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
        raise BadRecord(f"nested more than {MAX_DEPTH} levels deep")
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise NotUTF8(f"byte 0x{byte:02x} at column {error.start + 1} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON: {error.msg} at column {error.colno}") from None
    except BadRecord:
        raise
    except ValueError:  # Python's limit for reading decimal digits
        raise BadRecord("a number has more digits than Python reads") from None


def _depth(line: bytes) -> int:
    """How deep lists and objects are nested, at most.

    Asked beforehand, since parsing until Python's recursion limit lets whatever else runs at
    that depth, such as a finalizer, fail too.
    """
    outside = np.frombuffer(STRING.sub(b"", line), np.uint8)
    opened = np.isin(outside, np.frombuffer(b"[{", np.uint8)).astype(np.int32)
    closed = np.isin(outside, np.frombuffer(b"]}", np.uint8)).astype(np.int32)
    return int((opened - closed).cumsum().max(initial=0))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise BadRecord(f"the key {repeated!r} stands twice in one object")
    return record


def _constant(name: str) -> Any:
    raise BadRecord(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=Number, parse_constant=_constant)
