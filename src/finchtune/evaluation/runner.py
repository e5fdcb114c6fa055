"""An evaluation from a file of questions to a folder of answers, to be resumed where it stops.

Questions are answered in groups, and a group's rows are written at once. A group's answers are
made from the same start in the same batches whether or not the run was interrupted before it, so
the files of a resumed run are those of one that was not.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from finchtune.data.inputs import find_inputs, read_blocks
from finchtune.data.values import BadRecord
from finchtune.errors import UserError
from finchtune.evaluation.asking import Asker, Item
from finchtune.evaluation.task import Record, Row, Task
from finchtune.files import read_json, write_json
from finchtune.files.places import check_target

ROWS, SETTINGS, SUMMARY = "answers.jsonl", "settings.json", "summary.json"
GIVEN_GROUP = 256
GROUP_BATCHES = {"cpu": 1, "cuda": 4}
"""Batches in a group. A GPU's steps cost the same with few rows, so its groups end seldom."""


class Source(Protocol):
    """Where answers come from. `group` and `max_rows` are what a run stays with once begun."""

    def open(self, settings: dict[str, int], advance: Callable[[int], object]) -> dict[str, int]:
        """Get ready; `settings` are {} at first, then what the first call returned."""

    def rows(self, task: Task, items: Sequence[Item]) -> list[Row]:
        """The rows of a group."""


class Given:
    """Completions from a file."""

    def __init__(self, completions: Sequence[Any], items: Sequence[Item]):
        self.of = {(item.index, item.sample): c for item, c in zip(items, completions, strict=True)}

    def open(self, settings: dict[str, int], advance: Callable[[int], object]) -> dict[str, int]:
        """As in `Source`."""
        self.advance = advance
        return settings or {"group": GIVEN_GROUP}

    def rows(self, task: Task, items: Sequence[Item]) -> list[Row]:
        """As in `Source`."""
        completions = [self.of[item.index, item.sample] for item in items]
        rows = task.finished(items, [task.prompt_of(item, []) for item in items], completions)
        self.advance(len(rows) * task.n_turns)
        return rows


class Asked:
    """A model, which is loaded when the first answer is wanted."""

    def __init__(self, load: Callable[[], tuple[Any, Any]]):
        self.load = load

    def open(self, settings: dict[str, int], advance: Callable[[int], object]) -> dict[str, int]:
        """As in `Source`."""
        self.asker = Asker(*self.load(), settings.get("max_rows"), advance)
        kind = next(self.asker.model.parameters()).device.type
        rows = self.asker.max_rows
        return settings or {"group": rows * GROUP_BATCHES[kind], "max_rows": rows}

    def rows(self, task: Task, items: Sequence[Item]) -> list[Row]:
        """As in `Source`."""
        return task.rows(self.asker, items)


def read_records(path: str) -> Iterator[tuple[str, Record]]:
    """The records of a data file after their `file:line`; UserError for one that is none."""
    for file in find_inputs([path]):
        for block in read_blocks(file, "text"):
            for where, record in block.records():
                if isinstance(record, BadRecord):
                    raise UserError(f"{where}: {record}")
                yield where, record


def read_items(task: Task, path: str, shots: int, limit: int | None) -> list[Item]:
    """The questions of a file. The first `shots` are shown with their answers, not asked.

    Raises UserError naming the first record that is no question of the task, or if there is none.
    """
    records = []
    for where, record in read_records(path):
        try:
            if not isinstance(record, dict):
                raise BadRecord(f"an object with fields is needed, not {type(record).__name__}")
            task.check(record)
        except BadRecord as error:
            raise UserError(f"{where}: {error}") from None
        records.append(record)
        if limit is not None and len(records) == shots + limit:
            break
    if len(records) <= shots:
        raise UserError(f"{path}: holds {len(records)} questions, {shots} of them for `shots`")
    task.show(records[:shots])
    samples = range(task.choices.samples)
    return [
        Item(index, sample, record)
        for index, record in enumerate(records[shots:])
        for sample in samples
    ]


def read_answers(task: Task, path: str, items: Sequence[Item]) -> list[Any]:
    """The `completion` of each line; UserError unless there is one for each item."""
    completions = []
    for where, record in read_records(path):
        completion = record.get("completion") if isinstance(record, dict) else None
        kind = str if task.n_turns == 1 else list
        if not isinstance(completion, kind):
            what = "text" if kind is str else "list of texts"
            raise UserError(f"{where}: not an object with a {what} 'completion'")
        completions.append(completion)
    if len(completions) != len(items):
        raise UserError(f"{path}: {len(completions)} answers for {len(items)} questions")
    return completions


def evaluate(
    task: Task, items: Sequence[Item], source: Source, folder: Path, identity: dict[str, Any]
) -> dict[str, Any]:
    """Answer and score what is not yet in `folder`; returns and writes the summary.

    `identity` says of what evaluation the folder is. Raises UserError if it is of another.
    """
    check_target(folder, folder=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    settings = begun(folder, identity)
    rows = kept_rows(folder / ROWS, settings.get("group", 1), len(items))
    total, done = len(items) * task.n_turns, len(rows) * task.n_turns
    with tqdm(total=total, initial=done, unit="answer", leave=False, disable=None) as bar:
        if len(rows) < len(items):
            chosen = source.open(settings, bar.update)
            if not settings:
                write_json(folder / SETTINGS, identity | {"batches": chosen})
            for start in range(len(rows), len(items), chosen["group"]):
                group = source.rows(task, items[start : start + chosen["group"]])
                append_rows(folder / ROWS, group)
                rows += group
    summary = {"task": identity["task"], **task.summary(rows)}
    task.write(rows, identity["model"], folder)
    write_json(folder / SUMMARY, summary)
    return summary


def begun(folder: Path, identity: dict[str, Any]) -> dict[str, int]:
    """The batches of the run that began in the folder, {} if none did."""
    if not (folder / SETTINGS).exists():
        if (folder / ROWS).exists():
            raise UserError(f"{folder / ROWS} is of no evaluation; choose another `output`")
        return {}
    found = read_json(folder / SETTINGS)
    batches = found.pop("batches")
    for name, value in identity.items():
        if found.get(name) != value:
            raise UserError(
                f"{folder} holds an evaluation with another {name} ({found.get(name)}, now "
                f"{value}); choose another `output`"
            )
    return batches


def kept_rows(path: Path, group: int, total: int) -> list[Row]:
    """The rows of all groups that were written whole; what follows them is cut off the file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    n = len(lines) if len(lines) == total else len(lines) // group * group
    os.truncate(path, sum(len(line) + 1 for line in lines[:n]))
    return [json.loads(line) for line in lines[:n]]


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file; they are on the disk on return."""
    with path.open("ab") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
