"""Files and folders that appear whole, and several of them together, or not at all."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from finchtune.errors import UserError
from finchtune.files.places import check_target, is_disk_full, missing_parents, remove_empty
from finchtune.files.temporary import (
    create_temporary,
    make_due,
    new_name,
    put,
    remove,
    remove_leftovers,
    sync,
    sync_tree,
)

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)


class Pending(NamedTuple):
    """What is written under a temporary name; `descriptor` locks it."""

    target: Path
    temporary: Path
    descriptor: int


class FileSet:
    """Files and folders of one folder that get their names together when the `with` block ends.

    Where it raises, all temporaries are removed, with every folder made for them, and what stood
    there before stays. Several are published by a file that lists the renames due, which is there
    before the first is made: until it is, the old ones are valid; afterwards a reader finishes
    what a killed process did not (`finish_interrupted`). A full disk raises UserError.
    """

    def __init__(self) -> None:
        self._pending: list[Pending] = []
        self._obsolete: list[Path] = []
        self._made: list[Path] = []
        self._published = False

    def add(self, path: str | Path, folder: bool = False) -> Path:
        """A temporary file, or folder, that is to be named `path`.

        Raises UserError where it cannot: something other than a plain file (a folder) is there.
        """
        path = Path(path)
        check_target(path, folder)
        try:
            if not self._pending:
                self._made = missing_parents(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(path.parent)
            temporary, descriptor = create_temporary(path, folder)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        self._pending.append(Pending(path, temporary, descriptor))
        assert path.parent == self._pending[0].target.parent, "one folder for all"
        return temporary

    def drop(self, path: Path) -> None:
        """Have a file that an older set had removed, when this set appears."""
        self._obsolete.append(path)

    def written(self) -> dict[str, Path]:
        """The names to be -> where each of them is written now."""
        return {pending.target.name: pending.temporary for pending in self._pending}

    def __enter__(self) -> "FileSet":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None) -> None:
        """Publish, or with an error remove the temporaries and raise it, or what it stands for."""
        try:
            if error is not None:
                raise error
            self._publish()
        except BaseException as failure:
            if not self._published:
                for pending in self._pending:
                    remove(pending.temporary)
                remove_empty(self._made)
            self._explain(failure)
            raise
        finally:
            for pending in self._pending:
                os.close(pending.descriptor)

    def _publish(self) -> None:
        for pending in self._pending:
            sync_tree(pending.temporary)
        obsolete = [path for path in self._obsolete if os.path.lexists(path)]
        if not self._pending:
            return
        first = self._pending[0]
        if len(self._pending) > 1 or obsolete or first.target.is_dir():
            self._publish_together(obsolete)
        else:
            put(first.temporary, first.target)
            self._published = True
            sync(first.target.parent)

    def _publish_together(self, obsolete: list[Path]) -> None:
        renames = {pending.temporary.name: pending.target.name for pending in self._pending}
        due = {"rename": renames, "remove": [path.name for path in obsolete]}
        target = self._pending[0].target
        path = new_name(target, "due")
        listed, descriptor = create_temporary(target)
        self._pending.append(Pending(path, listed, descriptor))
        listed.write_text(json.dumps(due))
        sync(listed)
        sync(path.parent)
        os.replace(listed, path)
        self._published = True
        sync(path.parent)
        make_due(path)

    def _explain(self, error: BaseException) -> None:
        """Raise the UserError that a failed write stands for, if it is one."""
        if not self._pending:
            return
        path = self._pending[0].target
        if is_disk_full(error):
            raise UserError(
                f"{path}: the disk is full (or a quota or size limit reached); nothing was "
                "written there, and what was there stays"
            ) from error
        ours = {None, *(str(pending.temporary) for pending in self._pending)}
        if (
            isinstance(error, OSError)
            and error.errno in UNWRITABLE
            and (error.filename is None or str(error.filename) in ours)
        ):
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary file that gets the name `path` at the end: a `FileSet` of one."""
    with FileSet() as files:
        yield files.add(path)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that gets the name `path` at the end, in place of an earlier folder."""
    with FileSet() as files:
        yield files.add(path, folder=True)
