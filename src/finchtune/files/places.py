"""Where files may be written: what stands there already, and how much room there is."""

import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from finchtune.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def check_target(path: str | Path, folder: bool = False) -> None:
    """Raise UserError unless a file (with `folder` a folder) can get this name.

    Only a plain file gives way to a file, and only a folder to a folder.
    """
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} cannot be written: no name holds a NUL character")
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    wanted = stat.S_IFDIR if folder else stat.S_IFREG
    if stat.S_IFMT(mode) != wanted:
        found = KINDS.get(stat.S_IFMT(mode), "a file")
        raise UserError(
            f"{path} is {found}, which is not written over; nothing was written; choose another "
            "name"
        )


def missing_parents(path: Path) -> list[Path]:
    """The folders that `path` is to lie in and that are not there yet, deepest first."""
    return [folder for folder in path.parents if not folder.exists()]


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
    if isinstance(error, RuntimeError) and any(part in str(error) for part in writer):
        return True
    known = type(error).__name__ == "SafetensorError"  # which has the number in its text only
    return known and any(f"(os error {number})" in str(error) for number in FULL)


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise UserError unless that much can be written into a folder that exists."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(
            f"{folder}: {n_bytes / 1e6:,.1f} MB are needed but only {free / 1e6:,.1f} MB are free; "
            "nothing was written there; make room, or keep fewer checkpoints with `keep_last`"
        )
