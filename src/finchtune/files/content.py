"""What is in files: JSON, and checksums."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finchtune.errors import UserError
from finchtune.files.publish import atomic_path

SUM = re.compile(r"([0-9a-f]{64})  ([^/\n]+)\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """JSON as every file of ours has it: indented, with a final newline."""
    return json.dumps(content, indent=2) + "\n"


def read_json(path: str | Path) -> Any:
    """Read JSON; UserError names the file if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; UserError names the file if it is missing, broken or something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_text(digests: Mapping[str, str]) -> str:
    """Names of files in one folder with their sha256, as `sha256sum --check` reads them."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def check_sums(path: Path, names: set[str]) -> None:
    """Check the files beside `path` against the sha256 that stand in it.

    Raises UserError unless `path` lists just these names, and each file's content is as listed:
    no bit of the files or of the list can change unseen.
    """
    try:
        text = path.read_bytes().decode("ascii")
        lines = SUM.findall(text)
        listed = {name: digest for digest, name in lines}
        if set(listed) != names or len(lines) != len(names) or sums_text(listed) != text:
            raise UserError(f"{path} does not list just {', '.join(sorted(names))}")
        for name, digest in listed.items():
            file = path.with_name(name)
            if sha256(file) != digest:
                size = file.stat().st_size
                raise UserError(f"{name} ({size:,} bytes) does not match its checksum")
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start} is no ASCII") from error
