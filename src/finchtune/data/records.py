"""A JSON line -> a record, or the reason why it is none."""

import json
from typing import Any

from finchtune.data.render import BadRecord
from finchtune.errors import UserError

BOM = b"\xef\xbb\xbf"
MAX_REASON = 300


class BadRecords:
    """What happens to bad records: `fail` stops at the first, `skip` counts them."""

    def __init__(self, policy: str = "fail"):
        if policy not in ("fail", "skip"):
            raise UserError(f"--on_bad {policy}: choose fail or skip")
        self.policy = policy
        self.count = 0
        self.first = ""

    def add(self, where: str, reason: str) -> None:
        """Count a bad record; UserError under `fail`."""
        message = f"{where}: {reason if len(reason) <= MAX_REASON else reason[:MAX_REASON] + '...'}"
        if self.policy == "fail":
            raise UserError(f"{message} (--on_bad skip leaves such records out)")
        self.first = self.first or message
        self.count += 1


def parse_line(line: bytes) -> Any:
    """One JSON value; BadRecord with the reason. Stricter than `json`: no NaN, no repeated key."""
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise BadRecord(f"byte 0x{byte:02x} at column {error.start + 1} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRecord("nested too deeply") from None
    except BadRecord:
        raise
    except ValueError:  # Python's limit for reading decimal digits
        raise BadRecord("a number has more digits than Python reads") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise BadRecord(f"the key {repeated!r} stands twice in one object")
    return record


def _constant(name: str) -> Any:
    raise BadRecord(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
