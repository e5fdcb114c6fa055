"""The loss on texts or on answers, in nats a token, with perplexity and bits a byte."""

import math
from collections.abc import Sequence
from typing import Any

from finchtune.data.render import Layout
from finchtune.data.values import BadRecord
from finchtune.errors import UserError
from finchtune.evaluation.asking import Asker, Item
from finchtune.evaluation.likelihood import Document, log_likelihoods
from finchtune.evaluation.summary import weighted_mean
from finchtune.evaluation.task import Choices, Record, Row, Task
from finchtune.tokenizer import END_OF_DOCUMENT, Tokenizer


class Loss(Task):
    """`text`, or by --fields a question and its answer, of which the answer alone counts.

    As in training a document ends with token 0, which counts; it is predicted after a token 0 too.
    """

    default_template = None
    fields = ("text",)
    has_examples = False

    def __init__(self, choices: Choices):
        super().__init__(choices)
        if choices.given:
            raise UserError("the task loss asks a model: give `model`, not `answers`")
        self.layout = Layout(self.fields, template=choices.template)

    def check(self, record: Record) -> None:
        """As in the base class."""
        if not any(counts for _, counts in self.layout.pieces(record)):
            raise BadRecord("no text to compute the loss of")

    def rows(self, asker: Asker, items: Sequence[Item]) -> list[Row]:
        """The summed loss of each document, over how many tokens and bytes."""
        pieces = [self.layout.pieces(item.record) for item in items]
        documents = [encoded(asker.tokenizer, parts) for parts in pieces]
        found = log_likelihoods(asker.model, documents)
        asker.advance(len(items))
        return [
            {
                "index": item.index,
                "loss": -total,
                "tokens": sum(counted),
                "bytes": sum(len(text.encode()) for text, counts in parts if counts),
            }
            for item, parts, (_, counted), (total, _) in zip(
                items, pieces, documents, found, strict=True
            )
        ]

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The mean over all tokens; documents are what varies independently."""
        losses = [row["loss"] for row in rows]
        mean, low, high = weighted_mean(losses, [row["tokens"] for row in rows])
        bits = math.fsum(losses) / math.log(2) / sum(row["bytes"] for row in rows)
        return {
            "of": len(rows),
            "tokens": sum(row["tokens"] for row in rows),
            "loss": mean,
            "low": low,
            "high": high,
            "perplexity": math.exp(mean),
            "bits_per_byte": bits,
        }

    def line(self, summary: dict[str, Any]) -> str:
        """As in the base class."""
        return (
            "loss {loss:.4f} (95% interval {low:.4f} to {high:.4f}), perplexity {perplexity:.3f}, "
            "{bits_per_byte:.4f} bits a byte, {of} documents of {tokens} tokens"
        ).format(**summary)


def encoded(tokenizer: Tokenizer, pieces: Sequence[tuple[str, bool]]) -> Document:
    """A document's token ids, each piece tokenised by itself, and which count."""
    ids, counted = [END_OF_DOCUMENT], [False]
    for text, counts in pieces:
        own = tokenizer.encode(text)
        ids += own
        counted += [counts] * len(own)
    return [*ids, END_OF_DOCUMENT], [*counted, pieces[-1][1]]
