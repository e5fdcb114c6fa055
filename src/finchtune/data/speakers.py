"""Plain text in which speakers take turns -> its pieces, the answers' trained on."""

import re
from functools import lru_cache

from finchtune.data.templates import Piece
from finchtune.errors import UserError

PAIRS = (
    ("User", "Assistant"),
    ("Human", "Assistant"),
    ("Instruction", "Response"),
    ("Question", "Answer"),
    ("Q", "A"),
    ("Bob", "Alice"),
)
"""Who asks and who answers, as data sets for RWKV name them."""

Pairs = tuple[tuple[str, str], ...]


def parse_pairs(words: list[str]) -> Pairs:
    """`Customer/Agent` -> a pair; no words give the usual pairs. UserError for what is no pair."""
    for word in words:
        asks, slash, answers = word.partition("/")
        if not (slash and asks.strip() and answers.strip() and asks != answers):
            raise UserError(
                f"`speakers` {word}: give who asks and who answers, such as Customer/Agent"
            )
    return tuple((word.split("/", 1)[0], word.split("/", 1)[1]) for word in words) or PAIRS


def split_turns(text: str, pairs: Pairs) -> list[Piece]:
    """The text cut at the marks of one pair: a mark is `NAME:` at the beginning of a line.

    A mark and what follows `asks:` are not trained on; what follows `answers:` is, up to the next
    mark. A name inside a line is text. The pair is the one that answers and whose mark comes first.
    """
    marks = list(_pattern(pairs).finditer(text))
    heard = {mark[1] for mark in marks}
    first = {mark[1]: mark.start() for mark in reversed(marks)}
    present = [pair for pair in pairs if pair[1] in heard]
    if not present:
        return [(text, False)]
    pair = min(present, key=lambda p: min(first[name] for name in p if name in heard))
    pieces, end, answers = [], 0, False
    for mark in marks:
        if mark[1] in pair:
            pieces += [
                (text[end : mark.start()], answers),
                (text[mark.start() : mark.end()], False),
            ]
            end, answers = mark.end(), mark[1] == pair[1]
    return [*pieces, (text[end:], answers)]


@lru_cache(maxsize=8)
def _pattern(pairs: Pairs) -> re.Pattern[str]:
    """A name at the beginning of a line, also as a heading (`### Response:`)."""
    names = "|".join(re.escape(name) for name in sorted({name for pair in pairs for name in pair}))
    return re.compile(rf"^[ \t]*(?:#+ *)?({names}):", re.MULTILINE)
