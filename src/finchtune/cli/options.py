"""What several commands check of their flags."""

from pathlib import Path

from finchtune.errors import UserError


def refuse_overwriting(output: str, *inputs: str | None) -> None:
    """Raise UserError if an input would be overwritten."""
    if Path(output).resolve() in {Path(path).resolve() for path in inputs if path}:
        raise UserError(f"--output {output} would overwrite an input; choose another name")
