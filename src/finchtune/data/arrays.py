"""A JSON array, read element by element in bounded memory."""

import re
from collections.abc import Iterator
from typing import Any

from finchtune.data.values import BadRecord

# A whole string, the beginning of one that is not complete yet, or what an array is made of.
PART = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)


def elements(content: Any, block_bytes: int, max_bytes: int) -> Iterator[bytes]:
    """The elements of the array that begins with the next `[` of a stream, as bytes.

    BadRecord where the array does not end, an element is longer than `max_bytes`, or text follows.
    """
    held, place, begin, depth, number = bytearray(), 0, 0, 0, 0
    more = block_bytes
    while True:
        size = len(held)
        held += content.read(more)
        ended = len(held) == size
        for part in PART.finditer(held, place):
            mark = part[0]
            if mark == b'"':
                break  # of a string that ends in what is read next, or of none
            place = part.end()
            if depth == 1 and mark in b"],}":
                element = bytes(held[begin : part.start()])
                if number or mark != b"]" or element.strip():
                    yield element
                begin, number = place, number + 1
            depth += (mark in b"[{") - (mark in b"]}")
            if depth == 1 and not number and mark == b"[":
                begin = place
            if depth == 0:
                if mark != b"]" or held[place:].strip() or content.read(block_bytes).strip():
                    raise BadRecord("the array does not end with the file")
                return
        if ended:
            raise BadRecord("the array has no end; the file is truncated")
        if len(held) - begin > max_bytes:
            raise BadRecord(f"an element is longer than {max_bytes:,} bytes; split it")
        del held[:begin]
        place, begin = place - begin, 0
        # What is not complete is searched again: twice as much each time, so not often.
        more = max(block_bytes, len(held))
