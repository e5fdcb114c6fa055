"""Temporary files and folders, and what killed processes leave of them.

A temporary is made under a name that nobody can foresee and that must be new, so that no link
planted there is followed. Its process holds a lock on it: one without is a leftover, which the next
process that writes into the same folder removes. Several that are to appear together are listed in
a file of due renames (see publish.py), which the next process to come finishes.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finchtune.errors import UserError

TEMPORARY = re.compile(r"\..*\.finchtune-[0-9a-f]{16}\.tmp", re.DOTALL)
DUE = re.compile(r"\..*\.finchtune-[0-9a-f]{16}\.due", re.DOTALL)
PLAIN = re.compile(r"(?!\.{1,2}$)[^/\0]+", re.DOTALL)
NAME_BYTES = 150  # of the target's name in a temporary's; file systems take 255 in all


def new_name(target: Path, suffix: str) -> Path:
    """An unpredictable name beside `target`."""
    stem = os.fsencode(target.name)[:NAME_BYTES].decode("utf-8", "ignore")
    return target.with_name(f".{stem}.finchtune-{secrets.token_hex(8)}.{suffix}")


def create_temporary(target: Path, folder: bool = False) -> tuple[Path, int]:
    """Make a temporary file or folder beside `target`; its path, and a descriptor that locks it."""
    while True:
        path = new_name(target, "tmp")
        try:
            descriptor = _create(path, folder)
        except FileExistsError:
            continue
        except FileNotFoundError:
            if not target.parent.exists():
                raise
            continue  # taken for a leftover before it was opened
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():  # else taken for a leftover before it was locked
            return path, descriptor
        os.close(descriptor)


def _create(path: Path, folder: bool) -> int:
    if folder:
        path.mkdir()
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporaries that killed processes left in `folder`; what is due is finished."""
    finish_interrupted(folder)
    for path in entries(folder, TEMPORARY):
        with suppress(OSError), opened(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)


def finish_interrupted(folder: Path) -> None:
    """Make the renames that a killed process had begun in `folder`; waits for one that is alive.

    Whoever reads a file that is published with others calls this first. Raises UserError where
    they cannot be made.
    """
    for path in entries(folder, DUE):
        try:
            with suppress(FileNotFoundError), opened(path) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if path.exists():
                    make_due(path)
        except OSError as error:
            raise UserError(
                f"{folder}: a process was killed while it replaced files there, which cannot be "
                f"finished: {error.strerror}; let whoever may write there read them once"
            ) from error


def make_due(path: Path) -> None:
    """Make the renames and removals listed in the file `path`, of names beside it; then remove it.

    Made a second time they change nothing.
    """
    owner = path.lstat().st_uid
    if owner not in (0, os.geteuid()):
        raise UserError(f"{path}: an unfinished write of user {owner}, who has to finish it")
    due = read_due(path)
    for temporary, target in due["rename"].items():
        if os.path.lexists(path.with_name(temporary)):
            put(path.with_name(temporary), path.with_name(target))
    for name in due["remove"]:
        remove(path.with_name(name))
    sync(path.parent)
    path.unlink()


def read_due(path: Path) -> dict[str, Any]:
    """{"rename": {temporary: target}, "remove": [target]}. UserError for names elsewhere."""
    try:
        due = json.loads(path.read_text())
        names = [*due["rename"].values(), *due["remove"]]
        if all(map(TEMPORARY.fullmatch, due["rename"])) and all(map(PLAIN.fullmatch, names)):
            return due
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: not written by finchtune; remove it")


def put(temporary: Path, target: Path) -> None:
    """Give a temporary its name; a folder that has it already is removed."""
    if target.is_dir() and not target.is_symlink():
        discard(target)
    os.replace(temporary, target)


def discard(path: Path) -> None:
    """Remove a file or folder that is there; killed half-way, nothing half stays at `path`."""
    aside = new_name(path, "tmp")
    os.replace(path, aside)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def entries(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """What lies in a folder under names of a pattern; nothing if there is no such folder."""
    try:
        with os.scandir(folder) as found:
            return [folder / entry.name for entry in found if pattern.fullmatch(entry.name)]
    except OSError:
        return []


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a file or folder that is no link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder and all that is in it, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync_tree(child)
    sync(path)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
