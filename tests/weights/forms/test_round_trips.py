"""Every form gives back what was put into it, and says so where it cannot."""

import pytest
import torch
from helpers.exported import write
from helpers.support import NUMBERS, save_model, small_model

from finchtune.data import templates
from finchtune.errors import UserError
from finchtune.files import sha256
from finchtune.tokenizer import load_tokenizer
from finchtune.weights.base import load_model, read_base
from finchtune.weights.forms import DTYPES, FORMS, Settings, form_of

WRITTEN = [form for form in FORMS.values() if form.write]
HELD = [
    (number, form)
    for number, generation in NUMBERS.items()
    for form in WRITTEN
    if form.name in ("pth", "safetensors", *generation.layouts)
]
CASES = [(number, form.name, dtype) for number, form in HELD for dtype in DTYPES
         if dtype in form.dtypes]  # fmt: skip
LOSSY = {(6, "fla", "fp16"), (6, "gguf", "fp16")}
"""They divide tensors by powers of two, which takes digits of the smallest numbers of fp16."""
every_held = pytest.mark.parametrize(
    ("generation", "form"), HELD, ids=lambda value: getattr(value, "name", f"RWKV-{value}")
)


def settings(dtype: str) -> Settings:
    return Settings(dtype, "small", load_tokenizer("bytes"), templates.get("chat"))


def base_file(folder, dtype="fp32", **sizes):
    if sizes.get("generation") == 7:  # of odd ranks, and the head size that all forms have
        ranks = {f"dim_{part}_lora": n for part, n in (("decay", 7), ("rate", 9), ("value", 5))}
        sizes = {"n_embd": 128, "head_size": 64, **ranks} | sizes
    model = small_model(**({"n_layer": 7, "n_embd": 64, "head_size": 16} | sizes))
    return save_model(model.to(DTYPES[dtype]), folder / f"base-{dtype}.pth")


@pytest.mark.parametrize(("generation", "name", "dtype"), CASES)
def test_there_and_back_gives_the_same_bits(generation, name, dtype, tmp_path):
    base, form = base_file(tmp_path, dtype, generation=generation), FORMS[name]
    written = tmp_path / f"there{form.suffix}"
    digest = write(form, read_base(base), written, settings(dtype))
    assert digest is None or digest == sha256(written)
    assert form_of(written) is form
    before, after = read_base(base), read_base(written)
    assert list(before) == list(after)
    for key, tensor in before.items():
        found = after[key]
        assert found.shape == tensor.shape
        if (generation, name, dtype) in LOSSY:
            torch.testing.assert_close(found.to(tensor.dtype), tensor, atol=1e-5, rtol=0)
        else:
            assert torch.equal(found.to(tensor.dtype), tensor), key


@every_held
def test_every_form_serves_as_a_base(generation, form, tmp_path):
    base = base_file(tmp_path, generation=generation)
    written = tmp_path / f"there{form.suffix}"
    dtype = "fp32" if "fp32" in form.dtypes else "fp16"
    write(form, read_base(base), written, settings(dtype))
    tokens = torch.tensor([[5, 6, 7, 200]])
    expected = load_model(base)(tokens)[0]
    found = load_model(written, torch.float32)(tokens)[0]
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == "fp32" else 2e-2, rtol=1e-3)


@pytest.mark.parametrize("form", [f for f in WRITTEN if "fp16" in f.dtypes], ids=lambda f: f.name)
def test_a_number_that_fp16_cannot_hold_is_named(form, tmp_path):
    model = small_model(n_layer=4, n_embd=64, head_size=16)
    with torch.no_grad():
        model.blocks[2].ffn.key.weight[3, 4] = -70000.0
    base = save_model(model, tmp_path / "base.pth")
    with pytest.raises(UserError, match=r"(channel_mix_|ffn\.|feed_forward\.)key.* reaches 70000"):
        write(form, read_base(base), tmp_path / f"there{form.suffix}", settings("fp16"))


@pytest.mark.parametrize("form", WRITTEN, ids=lambda form: form.name)
def test_files_cut_short_end_in_one_line(form, tmp_path):
    written = tmp_path / f"there{form.suffix}"
    write(form, read_base(base_file(tmp_path)), written, settings(form.dtypes[0]))
    file = written / "model.safetensors" if written.is_dir() else written
    content = file.read_bytes()
    for length in (len(content) - 100, len(content) // 2, 40):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=str(file)):
            load_model(written)


def test_what_no_model_reads_stays_in_files_of_our_own(tmp_path):
    base = base_file(tmp_path, generation=7, dim_unused_lora=3)
    unread = {f"blocks.0.att.v{i}" for i in range(3)}
    assert unread < read_base(base).keys()
    for form in (form for number, form in HELD if number == 7):
        written = tmp_path / f"there{form.suffix or form.name}"
        write(form, read_base(base), written, settings(form.dtypes[0]))
        own = form.name in ("pth", "safetensors")
        assert unread & read_base(written).keys() == (unread if own else set())


def test_a_form_that_has_not_got_a_generation_says_so(tmp_path):
    with pytest.raises(UserError, match=r"the form hf has no RWKV-7; choose fla, gguf"):
        write(
            FORMS["hf"],
            read_base(base_file(tmp_path, generation=7)),
            tmp_path / "x",
            settings("fp32"),
        )
    base = base_file(tmp_path, generation=7, head_size=32)
    with pytest.raises(UserError, match="head size of 64 alone, and the model has 32"):
        write(FORMS["fla"], read_base(base), tmp_path / "y", settings("fp32"))


def test_wrapped_files_are_unwrapped(tmp_path):
    base = base_file(tmp_path)
    plain = read_base(base)
    for number, wrapped in enumerate(
        [
            {f"module.{name}": tensor for name, tensor in plain.items()},
            {f"_orig_mod.model.{name}": tensor for name, tensor in plain.items()},
            {"state_dict": dict(plain), "step": 7},
            {"model": {f"module.{name}": tensor for name, tensor in plain.items()}},
        ]
    ):
        torch.save(wrapped, tmp_path / f"{number}.pth")
        found = read_base(tmp_path / f"{number}.pth")
        assert list(found) == list(plain)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_folders_of_deepspeed(tmp_path):
    plain = read_base(base_file(tmp_path))
    checkpoint = tmp_path / "run" / "global_step7"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("global_step7")
    torch.save({"module": dict(plain), "dp": 1}, checkpoint / "mp_rank_00_model_states.pt")
    merged = tmp_path / "merged"
    merged.mkdir()
    torch.save({f"module.{n}": t for n, t in plain.items()}, merged / "pytorch_model.bin")
    for folder in (tmp_path / "run", checkpoint, merged):
        found = read_base(folder)
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    (checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(UserError, match=r"ZeRO stage 3, in shards; run `python zero_to_fp32"):
        read_base(tmp_path / "run")


def test_a_folder_in_shards(tmp_path):
    from safetensors.torch import load_file, save_file

    from finchtune.files import read_json, write_json

    base, form = base_file(tmp_path), FORMS["fla"]
    write(form, read_base(base), tmp_path / "whole", settings("fp32"))
    whole = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / "whole" / file)
        places |= dict.fromkeys(part, file)
    index = tmp_path / "whole" / "model.safetensors.index.json"
    write_json(index, {"metadata": {}, "weight_map": places})
    found = read_base(tmp_path / "whole")
    assert all(torch.equal(found[name], tensor) for name, tensor in read_base(base).items())
    (tmp_path / "whole" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"00002\.safetensors: no such file"):
        read_base(tmp_path / "whole")
    write_json(index, read_json(index) | {"weight_map": {"a": "../../etc/passwd"}})
    with pytest.raises(UserError, match="no file of weights beside it"):
        read_base(tmp_path / "whole")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"", r"\(0 bytes\) holds no weights"),
        (b"just text", "holds no weights in a form that is known"),
        (b"GGUF\3\0\0\0", "damaged or cut short"),
    ],
)
def test_what_is_no_model_is_told(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_base(tmp_path / "file")


def test_quantised_ggufs_and_web_rwkvs_fewest_layers(tmp_path):
    written = tmp_path / "q8.gguf"
    write(FORMS["gguf"], read_base(base_file(tmp_path)), written, settings("q8_0"))
    with pytest.raises(UserError, match=r"as Q8_0: what quantising took away is lost"):
        read_base(written)
    base = base_file(tmp_path, n_layer=3)
    with pytest.raises(UserError, match="no model of fewer than 4 layers; this one has 3"):
        write(FORMS["web-rwkv"], read_base(base), tmp_path / "x.st", settings("fp16"))
