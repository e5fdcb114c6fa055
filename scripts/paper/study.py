"""From a study, which is a table as data, to its cells, its table and its picture."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Cell, Pool
from tables import Column, Entry, Line, as_json, markdown, sweep

from finchtune.errors import INTERRUPTED
from finchtune.files import write_json, write_text

Key = tuple[Line, str]


@dataclass(frozen=True)
class Study:
    """Lines that are trained on courses, each cell being `cell(course, line, lr, seed)`.

    Every line runs at its learning rates (`rates` by course) with the first seed; the rate with the
    lowest outcome `choice` of its training is its own, with which the other seeds are run and the
    tests made. `read` gives a finished cell's results.
    """

    name: str
    title: str
    lines: Sequence[Line]
    columns: Sequence[Column]
    rates: Mapping[str, Sequence[float]]
    seeds: Sequence[int]
    cell: Callable[[str, Line, float, int], Cell]
    read: Callable[[Cell], dict[str, Any]] = Cell.results
    about: str = ""

    def pairs(self) -> Iterator[Key]:
        """Each line with each course."""
        return ((line, course) for line in self.lines for course in self.rates)

    def grid(self) -> dict[Key, dict[float, Cell]]:
        """The cells of the first seed by learning rate."""
        return {
            (line, course): {
                lr: self.cell(course, line, lr, self.seeds[0]) for lr in self.rates[course]
            }
            for line, course in self.pairs()
        }


def run(study: Study, output: Path, pool: Pool, draw: Callable[..., None] | None = None) -> int:
    """Run what is missing, write NAME.md, NAME.json and NAME.png; returns the exit status."""
    grid = study.grid()
    pool.run([training_only(cell) for cells in grid.values() for cell in cells.values()])
    if pool.stopped.is_set():
        return stopped()
    tried = {key: {lr: choice(cell) for lr, cell in cells.items()} for key, cells in grid.items()}
    chosen = {
        (line, course): [study.cell(course, line, best(rates), seed) for seed in study.seeds]
        for (line, course), rates in tried.items()
    }
    pool.run([cell for cells in chosen.values() for cell in cells])
    if pool.stopped.is_set():
        return stopped()
    entries = {
        (line.label, course): Entry(
            tried[line, course], best(tried[line, course]), [study.read(cell) for cell in cells]
        )
        for (line, course), cells in chosen.items()
    }
    text = "\n\n".join(paragraphs(study, entries)) + "\n"
    write_text(output / f"{study.name}.md", text)
    rows = as_json(study.lines, study.columns, entries)
    write_json(output / f"{study.name}.json", {"about": study.about, "lines": rows})
    if draw:
        draw(study, chosen, output / f"{study.name}.png")
    print(f"\n{text}\n{output / study.name}.md, .json" + (", .png" if draw else ""))
    return 0


def paragraphs(study: Study, entries: Mapping[tuple[str, str], Entry]) -> Iterator[str]:
    """The table in Markdown, with what it is of, and the learning rates that were tried."""
    yield f"## {study.title}"
    if study.about:
        yield study.about
    yield markdown(study.lines, study.columns, entries)
    for course in study.rates:
        tried = sweep(
            study.lines, entries, course, f"{course}: by learning rate, the lowest chosen"
        )
        if tried:
            yield tried


def training_only(cell: Cell) -> Cell:
    """The cell without its tests."""
    return dataclasses.replace(cell, steps=cell.steps[:1])


def choice(cell: Cell) -> float:
    """What a learning rate is chosen by; infinite for a training that diverged."""
    value = cell.results()["training"]["choice"]
    return value if value == value else float("inf")


def best(tried: Mapping[float, float]) -> float:
    """The learning rate of the lowest figure."""
    return min(tried, key=lambda lr: tried[lr])


def stopped() -> int:
    """The exit status of an interrupted call."""
    print("stopped; the same command continues from here")
    return INTERRUPTED
