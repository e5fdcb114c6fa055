"""A table as data: its lines and columns, and how it is written once its cells have run."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""What a cell's steps gave, by their names."""


@dataclass(frozen=True, eq=False)
class Line:
    """A line of a table: a method at a rank, with the paper's figures by column name."""

    label: str
    peft: str
    r: int
    paper: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Of `finchtune train`, besides the method and its rank."""
    name: str = ""
    """Of the line's cells, where method and rank are not enough."""


@dataclass(frozen=True)
class Column:
    """A figure of each line: which step of which course's cells gives it, and under what key."""

    name: str
    title: str
    course: str
    step: str
    key: str
    scale: float = 1.0
    digits: int = 2

    def values(self, results: Sequence[Results]) -> list[float]:
        """The figure of each cell that has it."""
        found = (result.get(self.step, {}).get(self.key) for result in results)
        return [value * self.scale for value in found if value is not None]

    def text(self, values: Sequence[float]) -> str:
        """The mean, with the standard deviation over seeds where there are several."""
        if not values:
            return "-"
        mean = f"{statistics.fmean(values):,.{self.digits}f}"
        if len(values) == 1:
            return mean
        return f"{mean} ± {statistics.stdev(values):,.{self.digits}f}"


@dataclass(frozen=True)
class Entry:
    """What a line's cells of one course gave: the learning rates tried, and the seeds of the best.

    `tried` has the figure by which the rate was chosen, the lowest being the best.
    """

    tried: Mapping[float, float]
    lr: float
    results: Sequence[Results]


Entries = Mapping[tuple[str, str], Entry]
"""By a line's label and a course."""


def markdown(lines: Sequence[Line], columns: Sequence[Column], entries: Entries) -> str:
    """A line for each method; a column of ours and, where it has figures, the paper's beside it."""
    titles, rows = ["strategy", "trained", "learning rate"], [head(line, entries) for line in lines]
    for column in columns:
        published = [line.paper.get(column.name) for line in lines]
        titles.append(column.title)
        for row, line in zip(rows, lines, strict=True):
            row.append(column.text(column.values(entries[line.label, column.course].results)))
        if any(value is not None for value in published):
            titles.append("paper")
            for row, value in zip(rows, published, strict=True):
                row.append("-" if value is None else f"{value:,.{column.digits}f}")
    return grid(titles, rows)


def head(line: Line, entries: Entries) -> list[str]:
    """A line's label, number of trained parameters, and learning rate of each course."""
    own = [entry for (label, _), entry in entries.items() if label == line.label]
    rates = list(dict.fromkeys(f"{entry.lr:g}" for entry in own))
    return [line.label, f"{own[0].results[0]['training']['trained']:,}", ", ".join(rates)]


def sweep(lines: Sequence[Line], entries: Entries, course: str, what: str) -> str:
    """The figures that learning rates were chosen by, the best in bold; "" for a single rate."""
    tried = [entries[line.label, course].tried for line in lines]
    rates = sorted({rate for one in tried for rate in one})
    if len(rates) < 2:
        return ""
    rows = []
    for line, one in zip(lines, tried, strict=True):
        best = entries[line.label, course].lr
        cells = [f"{one[rate]:.3f}" if rate in one else "-" for rate in rates]
        marked = [f"**{c}**" if rate == best else c for c, rate in zip(cells, rates, strict=True)]
        rows.append([line.label, *marked])
    return f"{what}:\n\n" + grid(["", *(f"{rate:g}" for rate in rates)], rows)


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(lines: Sequence[Line], columns: Sequence[Column], entries: Entries) -> list[Any]:
    """The same as values: for each line its figures of every seed and the paper's."""
    return [
        {
            "strategy": line.label,
            "peft": line.peft,
            "learning_rates": {
                course: {"chosen": entry.lr, "tried": {f"{k:g}": v for k, v in entry.tried.items()}}
                for (label, course), entry in entries.items()
                if label == line.label
            },
            "figures": {
                column.name: {
                    "seeds": column.values(entries[line.label, column.course].results),
                    "paper": line.paper.get(column.name),
                }
                for column in columns
            },
        }
        for line in lines
    ]
