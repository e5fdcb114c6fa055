"""finchtune export and finchtune info, as they are called."""

import pytest
from helpers.adapted import make_adapter
from helpers.support import assert_one_error_line, run_script

from finchtune.cli.export import main as export
from finchtune.cli.info import main as info
from finchtune.errors import UserError

SIZES = {"n_layer": 4, "n_embd": 64, "head_size": 16}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    base, _, adapter = make_adapter(folder, "bone", {"r": 8}, sizes=SIZES)
    return base, adapter


def shown(capsys, *arguments) -> str:
    info([*map(str, arguments)])
    return capsys.readouterr().out


def test_export_and_info_as_scripts(files, tmp_path):
    base, adapter = files
    path = tmp_path / "tuned.gguf"
    done = run_script("scripts/export.py", "--model", base, "--peft_checkpoint", adapter,
                      "--to", "gguf", "--output", path, "--template", "metamath")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ollama create NAME -f" in done.stdout
    modelfile = (tmp_path / "tuned.gguf.Modelfile").read_text()
    assert modelfile.startswith("FROM ./tuned.gguf\n")
    assert "### Response:" in modelfile
    done = run_script("scripts/info.py", path)
    assert done.returncode == 0, done.stderr
    for part in ("a model, as a GGUF", "x060", "n_layer 4", "train --load_model", "sha256"):
        assert part in done.stdout
    done = run_script("scripts/info.py", tmp_path / "nothing")
    assert_one_error_line(done, "nothing: no such file")


def test_info_of_adapters(files, tmp_path, capsys):
    base, adapter = files
    text = shown(capsys, adapter)
    for part in ("an adapter, as a .pth", "bone: r 8", "base.pth (sha256", "train --peft_load"):
        assert part in text
    common = ["--model", str(base), "--peft_checkpoint", str(adapter), "--adapter_only", "1"]
    for to, suffix in (("gguf", ".gguf"), ("web-rwkv", ".st"), ("peft", "")):
        path = tmp_path / f"adapter{suffix}"
        export([*common, "--to", to, "--output", str(path)])
        assert "told to a runtime as alpha: 8" in capsys.readouterr().out
        text = shown(capsys, path)
        assert "an adapter, as " in text
        assert "lora: r 8, alpha 8" in text
        assert "exported       from base base.pth" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "ggml", "--output", "x"], "no form 'ggml'; did you mean gguf"),
        (["--to", "gguf", "--output", "x.bin"], r"give it a name that ends in \.gguf"),
        (["--to", "gguf", "--output", "x.gguf", "--dtype", "q3_k"], "`dtype` q3_k: a GGUF .* has"),
        (["--to", "peft", "--output", "x"], "holds adapters: give --adapter_only 1"),
        (["--to", "deepspeed", "--output", "x"], "is only read"),
        (["--to", "gguf", "--output", "x.gguf", "--adapter_only", "1"], "needs --peft_checkpoint"),
        (["--to", "gguf", "--output", "x.gguf", "--template", "chta"], "did you mean chat"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        export(["--model", str(files[0]), *arguments])
    assert not list(tmp_path.iterdir())
