"""What the made-up corpora share: their names and things, and how they are written."""

import json
from collections.abc import Iterator
from pathlib import Path

from finchtune.files import atomic_path

NAMES = "Ada Ben Cleo Dan Eve Finn Gus Ida Jon Kim Leo Mia Ned Ola Pia Rex Sue Tom Una Zoe".split()
THINGS = "apples books cards coins eggs figs keys mugs nuts pens pears plums rings shells".split()


def write_corpus(records: Iterator[dict], folder: Path, train: int, test: int) -> None:
    """The first `train` records as train.jsonl, the next `test`, if any, as test.jsonl."""
    for name, count in (("train", train), ("test", test)):
        if count:
            with atomic_path(folder / f"{name}.jsonl") as path, path.open("w") as file:
                for _ in range(count):
                    file.write(json.dumps(next(records)) + "\n")
    print(f"{folder}: {train} records to train on, {test} held out")
