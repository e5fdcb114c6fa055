"""Lay training runs side by side in one HTML page that needs no other file.

    python scripts/report.py out/math
    python scripts/report.py out/bone out/lora out/full --output compare.html

RUN is a --proj_dir of train.py. Unfinished and damaged runs are shown as far as they can be read.
"""

import argparse
from pathlib import Path

from finchtune.cli.options import Parser, check_output
from finchtune.errors import UserError, printable
from finchtune.report import write_report


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", default="report.html", help="file to write [report.html]")
    given = parser.parse_args(arguments)
    check_output(given.output, suffixes=(".html",))
    for folder in given.runs:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder; give the --proj_dir of a run")
    print(printable(str(write_report(given.runs, given.output))))
