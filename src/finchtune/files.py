"""Files that are either whole or not there."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finchtune.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LEFTOVER = re.compile(r"\..+\.tmp-(\d+)")  # what temporary_beside names, and whose it is


def cache_folder() -> Path:
    """Where what was compiled is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finchtune"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (a file or folder to be); rename it there on success.

    On any failure the temporary is removed, with every folder made for it, and what stood at
    `path` before stays. A full disk raises UserError.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    made: list[Path] = []
    try:
        made = make_parents(path)
        yield temporary
        sync_tree(temporary)
        if path.is_dir():
            discard(path)  # only an empty folder can be replaced
        os.replace(temporary, path)
        sync_tree(path.parent, deep=False)
    except BaseException as error:
        remove(temporary)
        remove_empty(made)
        if is_disk_full(error):
            raise UserError(
                f"{path}: the disk is full (or a quota or size limit reached); nothing was "
                "written there, and what was there stays"
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError):
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        raise


def make_parents(path: Path) -> list[Path]:
    """Make the folders that `path` is to lie in; returns those that were missing, deepest first."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders, given deepest first, that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; torch.save hides the system's own error."""
    if isinstance(error, OSError):
        return error.errno in FULL
    writer = ("inline_container.cc", "iostream error")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in writer)


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise UserError unless that much can be written into a folder that exists."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(
            f"{folder}: {n_bytes / 1e6:,.1f} MB are needed but only {free / 1e6:,.1f} MB are free; "
            "nothing was written there; make room, or keep fewer checkpoints with --keep_last"
        )


def temporary_beside(path: Path) -> Path:
    """A name in the same folder, which says which process it belongs to."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def discard(path: Path) -> None:
    """Remove a file or folder that is there; killed half-way, nothing half stays at `path`."""
    aside = temporary_beside(path.with_name(path.name + ".old"))
    remove(aside)
    os.replace(path, aside)
    remove(aside)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in `folder`.

    To be called before this process writes there: one of its own number is an earlier one's.
    """
    for path in folder.glob(".*.tmp-*"):
        match = LEFTOVER.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not Path("/proc", match[1]).exists()):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(path: Path, deep: bool = True) -> None:
    """Flush a file, or a folder and all that is in it, to the disk."""
    if deep and path.is_dir():
        for child in path.iterdir():
            sync_tree(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; UserError names the file if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
