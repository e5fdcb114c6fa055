"""Recall over long contexts: scripts/make_recall.py's records, right by the first number written.

The summary also tells the share of right answers by the length of the context.
"""

import re
from collections.abc import Sequence
from typing import Any

from finchtune.data.values import BadRecord, text_of
from finchtune.evaluation.summary import share
from finchtune.evaluation.task import Record, Row, Task

NUMBER = re.compile(r"-?\d+")


class Recall(Task):
    """`question`, which is the whole context, `answer`, a number, and `length`."""

    max_tokens = 16

    def gold(self, record: Record) -> str:
        """The number that was given at the beginning."""
        gold = text_of(record, self.fields[1]).strip()
        if not NUMBER.fullmatch(gold):
            raise BadRecord(f"the field {self.fields[1]!r} is no number")
        return gold

    def score(self, record: Record, completion: str) -> Row:
        """As in the base class; `length` is the context's, in characters."""
        gold, found = self.gold(record), NUMBER.search(completion)
        extracted = found[0] if found else None
        length = len(text_of(record, self.fields[0]))
        return {
            "extracted": extracted, "gold": gold, "correct": extracted == gold, "length": length
        }  # fmt: skip

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """As in the base class, and `by_length`: {the power of two above it: share}."""
        classes: dict[int, list[bool]] = {}
        for row in rows:
            classes.setdefault(1 << row["length"].bit_length(), []).append(row["correct"])
        by_length = {str(size): share(classes[size]) for size in sorted(classes)}
        return {**super().summary(rows), "by_length": by_length}

    def line(self, summary: dict[str, Any]) -> str:
        """As in the base class, with the shares by length."""
        parts = [f"below {size} {one['rate']:.0%}" for size, one in summary["by_length"].items()]
        return f"{super().line(summary)}; by characters: {', '.join(parts)}"
