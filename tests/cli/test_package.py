"""The package as pip installs it: complete, typed, with one command that works from anywhere."""

import json
import os
import subprocess
import sys
import zipfile
from importlib import import_module

import pytest
from helpers.support import REPOSITORY

import finchtune
from finchtune.cli.main import VERBS


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    stale = REPOSITORY / "build" / "lib" / "finchtune" / "left_by_an_earlier_build.py"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([sys.executable, *build, str(REPOSITORY)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_sources_of_kernels_and_types(installed):
    packaged = {str(p.relative_to(installed / "finchtune/cuda")) for p in
                (installed / "finchtune/cuda").rglob("*") if p.is_file()}  # fmt: skip
    wanted = {str(p.relative_to(REPOSITORY / "cuda")) for p in (REPOSITORY / "cuda").rglob("*")
              if p.is_file() and p.suffix != ".md"}  # fmt: skip
    assert wanted <= packaged
    python = {p.relative_to(REPOSITORY / "src") for p in (REPOSITORY / "src").rglob("*.py")}
    packaged_python = {p.relative_to(installed) for p in installed.rglob("*.py")}
    assert packaged_python == python
    for name in ("py.typed", "report/report.js", "tokenizer/world_trie.cpp"):
        assert (installed / "finchtune" / name).exists(), name
    assert f"finchtune-{finchtune.__version__}" in " ".join(p.name for p in installed.iterdir())


def test_it_trains_in_an_empty_folder(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def run(*words):
        command = [sys.executable, "-W", "error::UserWarning", "-m", "finchtune", *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "one two three four"}) + "\n")
    run(*"init --n_layer 2 --n_embd 32 --vocab_size 256 --head_size_a 8 --output m.pth".split())
    run(
        *"train --load_model m.pth --data_file text.jsonl --data_type jsonl --ctx_len 16".split(),
        *"--tokenizer bytes --peft bone --bone_r 8 --epoch_steps 2".split(),
    )
    run(*"merge --base_model m.pth --peft_checkpoint out/rwkv-0.pth --output merged.pth".split())
    assert (tmp_path / "merged.pth").exists()
    assert run("--version").strip() == f"finchtune {finchtune.__version__}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as end:
        import_module(f"finchtune.cli.{verb}").main(["--help"])
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out
