"""Tell what a file or folder of weights is, and which commands take it."""

from pathlib import Path

from finchtune.cli.options import Parser
from finchtune.errors import printable
from finchtune.weights.description import describe


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="FILE|FOLDER")
    parser.add_argument(
        "--hash", type=int, choices=(0, 1), default=1, help="0 leaves out the sha256 [1]"
    )
    given = parser.parse_args(arguments)
    for path in given.paths:
        print(printable(path))
        for name, value in describe(Path(path), bool(given.hash)).items():
            print(f"  {name:14} {printable(value)}")
