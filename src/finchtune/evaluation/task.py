"""What a task says of itself: how it asks, where answers end, and which are right."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finchtune.data import templates
from finchtune.data.templates import Template
from finchtune.data.values import text_of
from finchtune.errors import UserError
from finchtune.evaluation.asking import Asker, Item, Wish
from finchtune.evaluation.summary import share

Record = dict[str, Any]
Row = dict[str, Any]

TURNS = ("\n### ", "\nQuestion:", "\nUser:", "\nUSER:", "\nHuman:")
"""Where a model that does not end its answer begins the next turn of a made-up dialogue."""


@dataclass(frozen=True)
class Choices:
    """What the user decides of a task; None is the task's own.

    `fields` names the fields of a record. `given`: the answers are not of a model asked here.
    """

    strict_parity: bool = False
    template: Template | None = None
    max_tokens: int | None = None
    fields: tuple[str, ...] | None = None
    samples: int = 1
    temperature: float = 0.0
    given: bool = False


class Task:
    """Questions of one kind. A subclass has a file of its own in tasks/, with the task's name."""

    default_template: str | None = "metamath"
    """None: the record's own text is the prompt."""
    max_tokens = 512
    fields: tuple[str, ...] = ("question", "answer")
    own_stops: tuple[str, ...] = ()
    parity_stops: tuple[str, ...] | None = None
    """Those of the published protocol, where it has others."""
    n_turns = 1
    has_examples = True
    sampled = False
    """Whether several answers to a question are of use (pass@k)."""

    def __init__(self, choices: Choices):
        self.choices = choices
        default = self.default_template
        self.template = choices.template or (templates.get(default) if default else None)
        self.fields = choices.fields or self.fields
        self.max_tokens = choices.max_tokens or self.max_tokens
        self.shown = ""
        if choices.samples > 1 and not self.sampled:
            raise UserError("`samples` is for the tasks humaneval and mbpp")

    def require(self) -> None:
        """Raise UserError where this machine cannot score the task."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        if self.choices.strict_parity and self.parity_stops:
            return self.parity_stops
        return (*self.own_stops, *self.template.stop, *TURNS) if self.template else self.own_stops

    def check(self, record: Record) -> None:
        """BadRecord with the reason if a record is not a question of this task."""
        self.prompt(record, [])
        self.gold(record)

    def prompt(self, record: Record, answers: Sequence[str]) -> str:
        """The text to continue, after the `answers` to a question's earlier turns."""
        question = text_of(record, self.fields[0])
        return self.template.prompt(question) if self.template else question

    def example(self, record: Record) -> str:
        """A question with its answer, to be shown before another question."""
        return self.answered(record, self.gold(record))

    def answered(self, record: Record, answer: str) -> str:
        """A question and an answer as one text."""
        prompt = self.prompt(record, [])
        apart = "" if not self.template or prompt[-1:].isspace() else " "
        return f"{prompt}{apart}{answer}"

    def gold(self, record: Record) -> str:
        """The expected answer."""
        return text_of(record, self.fields[-1])

    def temperature(self, record: Record) -> float:
        """0 is greedy."""
        return self.choices.temperature

    def show(self, examples: Sequence[Record]) -> None:
        """Put examples with their answers before every question."""
        if examples and not self.has_examples:
            raise UserError("`shots` is not for this task")
        self.shown = "".join(f"{self.example(record)}\n\n" for record in examples)

    def prompt_of(self, item: Item, answers: Sequence[str]) -> str:
        """`prompt` of an item, after the examples."""
        return self.shown + self.prompt(item.record, answers)

    def rows(self, asker: Asker, items: Sequence[Item]) -> list[Row]:
        """What is to be written down of each item, the model's answers among it."""
        answers: list[list[str]] = [[] for _ in items]
        for _ in range(self.n_turns):
            wishes = [self.wish(item, own) for item, own in zip(items, answers, strict=True)]
            texts = asker.write(wishes)
            for own, text in zip(answers, texts, strict=True):
                own.append(text)
        prompts = [wish.prompt for wish in wishes]
        return self.finished(items, prompts, [a if self.n_turns > 1 else a[0] for a in answers])

    def wish(self, item: Item, answers: Sequence[str]) -> Wish:
        """What a model is asked; a sample's seed is its own, whatever else is asked."""
        return Wish(
            self.prompt_of(item, answers),
            self.max_tokens,
            self.stops,
            self.temperature(item.record),
            seed=item.index * self.choices.samples + item.sample,
        )

    def finished(
        self, items: Sequence[Item], prompts: Sequence[str], completions: Sequence[Any]
    ) -> list[Row]:
        """Rows of answers and their scores."""
        scores = self.scores([item.record for item in items], completions)
        return [
            {
                "index": item.index,
                **({"sample": item.sample} if self.choices.samples > 1 else {}),
                "prompt": prompt,
                "completion": completion,
                **score,
            }
            for item, prompt, completion, score in zip(
                items, prompts, completions, scores, strict=True
            )
        ]

    def write(self, rows: Sequence[Row], name: str, folder: Path) -> None:
        """Write whatever else a task's results are good for; `name` is the model's."""

    def scores(self, records: Sequence[Record], completions: Sequence[Any]) -> list[Row]:
        """`extracted`, `gold`, `correct` and whatever else is to be told of each completion."""
        return [self.score(*pair) for pair in zip(records, completions, strict=True)]

    def score(self, record: Record, completion: Any) -> Row:
        """`scores` of one."""
        raise NotImplementedError

    def as_stopped(self, completion: str) -> str:
        """A completion as the published protocol's stop strings would have ended it.

        Given answers have ended where they end.
        """
        return completion if self.choices.given else cut(completion, self.parity_stops or ())

    def either(self, gold: str, parity: tuple[Any, bool], repaired: tuple[Any, bool]) -> Row:
        """A row of two scorers' (extracted, correct); the one that was asked for counts."""
        extracted, correct = parity if self.choices.strict_parity else repaired
        found = None if extracted is None else str(extracted)
        row = {"extracted": found, "gold": gold, "correct": correct}
        return row | {"parity": parity[1], "repaired": repaired[1]}

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """How many are right by each score, with its confidence interval."""
        names = [name for name in ("correct", "parity", "repaired") if name in rows[0]]
        return {name: share([row[name] for row in rows]) for name in names}

    def line(self, summary: dict[str, Any]) -> str:
        """The summary in words."""
        both = [name for name in ("parity", "repaired") if name in summary]
        parts = [f"{name} {summary[name]['rate']:.1%}" for name in both]
        right = summary["correct"]
        return "; ".join(
            [
                f"{right['right']} of {right['of']} right, {right['rate']:.1%} "
                f"(95% interval {right['low']:.1%} to {right['high']:.1%})",
                *parts,
            ]
        )


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings in it."""
    ends = [text.find(stop) for stop in stops]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def after_last(text: str, marker: re.Pattern[str]) -> str | None:
    """What follows the last match of a marker; None without one."""
    found = list(marker.finditer(text))
    return text[found[-1].end() :] if found else None
