"""Files that appear together or not at all, whenever their writer is killed."""

import fcntl
import json
import os
from pathlib import Path

import pytest
from helpers.kills import kill_everywhere

from finchtune.errors import UserError
from finchtune.files import (
    FileSet,
    atomic_folder,
    atomic_path,
    finish_interrupted,
    remove_leftovers,
    temporary,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def write_set(folder: Path, version: str) -> None:
    with FileSet() as files:
        for name in ("a", "b", "c"):
            files.add(folder / name).write_text(version)
        files.drop(folder / "old")


OLD = {"a": "1", "b": "1", "old": "1"}
NEW = {"a": "2", "b": "2", "c": "2"}


@pytest.mark.parametrize("before", [{}, OLD], ids=["new", "replaced"])
def test_a_set_killed_anywhere_is_the_old_or_the_new_one(tmp_path, before):
    def put_back():
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in before.items():
            (tmp_path / name).write_text(text)

    put_back()
    found = []
    for _ in kill_everywhere(lambda: write_set(tmp_path, "2"), tmp_path):
        remove_leftovers(tmp_path)  # as the next run does, or a reader
        found.append(contents(tmp_path))
        put_back()
    assert contents(tmp_path) == NEW
    assert all(state in (before, NEW) for state in found), found
    assert found.count(NEW) >= 3, "killed between the renames"
    assert found.count(before) >= 3


def test_readers_alone_finish_a_set(tmp_path):
    write_set(tmp_path, "1")
    (tmp_path / "old").write_text("1")
    states = []
    for _ in kill_everywhere(lambda: write_set(tmp_path, "2"), tmp_path):
        finish_interrupted(tmp_path)
        states.append("".join((tmp_path / name).read_text() for name in "abc"))
    assert set(states) == {"111", "222"}


def test_a_folder_is_replaced_at_once(tmp_path):
    def write():
        with atomic_folder(tmp_path / "step-1") as folder:
            (folder / "state").write_text("new")
            (folder / "sums").write_text("new")

    def old():
        (tmp_path / "step-1").mkdir(exist_ok=True)
        for name in ("state", "sums"):
            (tmp_path / "step-1" / name).write_text("old")

    old()
    for _ in kill_everywhere(write, tmp_path):
        remove_leftovers(tmp_path)
        assert names(tmp_path) == ["step-1"]
        assert set(contents(tmp_path / "step-1").values()) in ({"old"}, {"new"})
        assert names(tmp_path / "step-1") == ["state", "sums"]
        old()


def test_temporaries_are_unpredictable_and_follow_no_link(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    tokens = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(temporary.secrets, "token_hex", lambda n: next(tokens))
    planted = tmp_path / f".out.finchtune-{'0' * 16}.tmp"
    planted.symlink_to(victim)
    with atomic_path(tmp_path / "out") as path:
        path.write_text("x")
    assert victim.read_text() == "precious"
    assert contents(tmp_path) == {"victim": "precious", planted.name: "precious", "out": "x"}


def test_leftovers_alone_are_removed(tmp_path):
    dead = ["file", "folder"]
    for kind in dead:
        path = tmp_path / f".{kind}.finchtune-{'a' * 16}.tmp"
        path.mkdir() if kind == "folder" else path.touch()
    (tmp_path / ".hidden.tmp").touch()
    with atomic_path(tmp_path / "other") as alive:
        remove_leftovers(tmp_path)
        assert names(tmp_path) == sorted([".hidden.tmp", alive.name])
    assert names(tmp_path) == [".hidden.tmp", "other"]
    remove_leftovers(tmp_path / "missing")


def test_a_list_of_renames_from_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "inner").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("precious")
    due = tmp_path / "inner" / f".a.finchtune-{'a' * 16}.due"
    moved = f".a.finchtune-{'b' * 16}.tmp"
    for content in (
        {"rename": {moved: "../outside"}, "remove": []},
        {"rename": {}, "remove": ["../outside"]},
        {"rename": {"a": "b"}, "remove": []},
        {"rename": {}, "remove": [".."]},
        [],
    ):
        due.write_text(json.dumps(content))
        (tmp_path / "inner" / moved).write_text("evil")
        with pytest.raises(UserError, match="not written by finchtune; remove it"):
            finish_interrupted(tmp_path / "inner")
    assert outside.read_text() == "precious"


def test_a_reader_waits_for_a_writer_at_work(tmp_path):
    due = tmp_path / f".a.finchtune-{'a' * 16}.due"
    due.write_text('{"rename": {}, "remove": ["a"]}')
    (tmp_path / "a").touch()
    reader, writer = os.pipe()
    with due.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        child = os.fork()
        if child == 0:
            held.close()
            finish_interrupted(tmp_path)
            os.write(writer, b"done")
            os._exit(0)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 4)
        assert (tmp_path / "a").exists()
    os.waitpid(child, 0)
    assert names(tmp_path) == []


ODD = {
    "nothing": ("", "is a folder"),
    "here": (".", "is a folder"),
    "root": ("/", "is a folder"),
    "a folder": ("full", "is a folder"),
    "a linked folder": ("link", "is a folder"),
    "a device": ("/dev/null", "is a device"),
    "too long": ("x" * 300, "File name too long"),
    "too deep": ("x/" * 5000, "File name too long"),
    "NUL": ("a\0b", "no name holds a NUL"),
    "under a file": ("plain/out", "Not a directory"),
    "a pipe": ("pipe", "is a pipe"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_plain_file_is_not_written_over(tmp_path, monkeypatch, odd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("full")
    (tmp_path / "plain").touch()
    os.mkfifo("pipe")
    before = names(tmp_path)
    path, message = ODD[odd]
    with pytest.raises(UserError, match=message), atomic_path(path) as temporary_path:
        temporary_path.write_text("new")
    assert names(tmp_path) == before
    assert contents(tmp_path / "full") == {"precious": "precious"}


def test_long_names_that_fit_are_written(tmp_path):
    for name in ("x" * 255, "鳥" * 85):
        with atomic_path(tmp_path / name) as path:
            path.write_text("new")
        assert (tmp_path / name).read_text() == "new"


def test_a_failure_leaves_no_folders_made_for_it(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a" / "b" / "c"):
        raise ZeroDivisionError
    assert names(tmp_path) == []
