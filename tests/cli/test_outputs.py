"""--output of every command: nothing but a plain file of its own kind gives way to it."""

import os

import pytest
from helpers.adapted import make_adapter

from finchtune.cli import convert, init, merge, report, unmerge
from finchtune.errors import UserError

COMMANDS = ("merge", "unmerge", "init", "report")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base, _, adapter = make_adapter(folder, "bone", {"r": 8})
    (folder / "run").mkdir()
    return base, adapter


def run(command, made, output):
    base, adapter = map(str, made)
    folder = str(made[0].with_name("run"))
    files = ["--peft_checkpoint", adapter, "--output", output]
    sizes = ["--n_layer", "1", "--n_embd", "64", "--vocab_size", "64", "--output", output]
    return {
        "merge": lambda: merge.main(["--base_model", base, *files]),
        "unmerge": lambda: unmerge.main(["--merged_model", base, *files]),
        "init": lambda: init.main(sizes),
        "report": lambda: report.main([folder, "--output", output]),
    }[command]()


ODD = {
    "nothing": "",
    "here": ".",
    "root": "/",
    "a folder with files": "full",
    "a folder by another name": "full/",
    "the inputs' folder": "INPUTS",
    "a device": "/dev/null",
    "too long": "x" * 300 + ".pth",
    "NUL": "a\0.pth",
    "under a file": "plain/m.pth",
    "no ending": "merged",
    "safetensors": "m.safetensors.zip",
    "text": "m.txt",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_outputs_are_refused_and_nothing_is_removed(made, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("precious")
    (tmp_path / "plain").touch()
    inputs = sorted(path.name for path in made[0].parent.iterdir())
    for odd in ODD.values():
        with pytest.raises(UserError):
            run(command, made, str(made[0].parent) if odd == "INPUTS" else odd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "plain"]
    assert (tmp_path / "full" / "precious").read_text() == "precious"
    assert sorted(path.name for path in made[0].parent.iterdir()) == inputs


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_place_is_told_before_the_work(made, tmp_path, monkeypatch, command):
    suffix = {"report": ".html"}.get(command, ".pth")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="cannot be written to"):
        run(command, made, str(tmp_path / f"m{suffix}"))


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_an_input_by_another_name_is_not_written_over(made, tmp_path, link):
    base, _ = made
    link(base, tmp_path / "other.pth")
    before = base.read_bytes()
    with pytest.raises(UserError, match="would overwrite an input"):
        run("merge", made, str(tmp_path / "other.pth"))
    assert base.read_bytes() == before


def test_convert_writes_over_nothing(made, tmp_path):
    (tmp_path / "full").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert.main(["--input", str(made[1]), "--output", str(tmp_path / "full")])
