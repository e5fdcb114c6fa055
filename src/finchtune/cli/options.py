"""What several commands have in common: how flags are refused, and what is checked of them."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from finchtune.errors import UserError
from finchtune.files import check_target

OTHER_BASE = "1 lets --peft_checkpoint be used on another base than its own, such as a merged one"


class Parser(argparse.ArgumentParser):
    """Whatever is wrong with a command line is a UserError, in one line fit for a terminal."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def check_output(output: str, *inputs: str | None, suffixes: tuple[str, ...] = (".pth",)) -> None:
    """Raise UserError unless --output names a file to be that may be written.

    Nothing but a plain file gives way to it, no input is written over, and a name whose ending
    promises something else than what is written is refused.
    """
    check_target(output)
    if Path(output).suffix not in suffixes:
        known = " or ".join(suffixes)
        raise UserError(f"--output {output}: give it a name that ends in {known}")
    for path in inputs:
        if (
            path
            and Path(path).exists()
            and Path(output).exists()
            and os.path.samefile(output, path)
        ):
            raise UserError(f"--output {output} would overwrite an input; choose another name")
    folder = next((folder for folder in Path(output).parents if folder.exists()), Path("."))
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {output}: {folder} cannot be written to")
