"""Folders of compiled code, which must not be the code of anybody else who may write there."""

import grp
import os
import pwd
import stat
import tempfile
from pathlib import Path

from finchtune.errors import UserError


def cache_folder() -> Path:
    """Where what was compiled is kept between runs.

    A user without a home, as containers have, gets a folder among the temporary files.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "finchtune"
    try:
        home = os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return Path(tempfile.gettempdir()) / f"finchtune-{os.geteuid()}"
    return Path(home) / ".cache" / "finchtune"


def make_private(folder: Path) -> None:
    """Make a folder that only its user can read and write, and check it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_private(folder)


def require_private(path: Path) -> None:
    """Raise UserError if anybody but the user and root may write a file, or a folder above it.

    A group that has no other member is the user's own. In a folder like /tmp others cannot take
    the place of what is not theirs.
    """
    path = Path(os.path.abspath(path))
    for place in (path, *path.parents):
        found = place.lstat()
        sticky = place != path and bool(found.st_mode & stat.S_ISVTX)
        by_group = found.st_mode & stat.S_IWGRP and not is_own_group(found.st_gid)
        writable = not stat.S_ISLNK(found.st_mode) and (found.st_mode & stat.S_IWOTH or by_group)
        if found.st_uid not in (0, os.geteuid()) or (writable and not sticky):
            raise UserError(
                f"{path} is not used: others can write to {place}; take that right away "
                "(chmod go-w), or give XDG_CACHE_HOME a folder of your own"
            )


def is_own_group(gid: int) -> bool:
    """Whether a group has no member but this user (or is root's)."""
    try:
        user = pwd.getpwuid(os.geteuid())
        members = {one.pw_name for one in pwd.getpwall() if one.pw_gid == gid}
        others = (members | set(grp.getgrgid(gid).gr_mem)) - {user.pw_name}
    except KeyError:
        return False
    return gid in (0, user.pw_gid) and not others
