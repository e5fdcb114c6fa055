"""Run every table's and figure's --smoke, one after the other, and put the tables into a document.

In the document a table stands between `<!-- NAME -->` and `<!-- end NAME -->`.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from finchtune.errors import UserError, run_cli
from finchtune.files import write_text

FOLDER = Path(__file__).parent
TRAINED = {
    "table2": ("math", "code", "chat"),
    **dict.fromkeys(("table3", "table4", "table5", "table6", "figure5", "figure6"), ("math",)),
}
UNTESTED = ("table6",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a small RWKV, such as tiny6.pth")
    add("--train", required=True, help="GSM8K's training questions, .jsonl")
    add("--test", nargs="+", default=[], metavar="NAME=FILE", help="as in the tables' scripts")
    add("--output", required=True, type=Path)
    add("--document", type=Path, help="to put the tables into, such as docs/paper.md")
    add("--jobs", type=int, default=1, help="cells side by side")
    given = parser.parse_args()
    for name, words in commands(given).items():
        began = time.monotonic()
        if subprocess.run([sys.executable, FOLDER / f"{name}.py", *words]).returncode:
            raise UserError(f"{name} failed")
        took = f"{time.monotonic() - began:.0f} s"
        print(f"{name}: {took}\n", flush=True)
        if given.document:
            table = (given.output / f"{name}.md").read_text().partition("\n\n")[2].strip()
            text = put(given.document.read_text(), name, f"{table}\n\n{took}.")
            write_text(given.document, text)


def commands(given: argparse.Namespace) -> dict[str, list[str]]:
    """The words after each script."""
    common = ["--smoke", "--output", str(given.output)]
    data = ["--model", given.model, "--data_file", given.train]
    found = {"figure1": [*common, *data], "table1": [*common, "--jobs", str(given.jobs)]}
    for name, courses in TRAINED.items():
        words = [*common, "--model", given.model, "--data"]
        words += [f"{course}={given.train}" for course in courses]
        if name not in UNTESTED:
            words += ["--jobs", str(given.jobs), "--test", *given.test]
        found[name] = words
    return found


def put(document: str, name: str, text: str) -> str:
    """The document with `text` between the marks of `name`; as it is if it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    between = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return between.sub(lambda _: f"{begin}\n{text}\n{end}", document)


if __name__ == "__main__":
    run_cli(main)
