"""Weight files: strict, safe loading; whole-or-nothing writing."""

import pickle
from pathlib import Path

import pytest
import torch
from helpers.support import save_model, small_model

from finchtune.errors import UserError
from finchtune.training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from finchtune.weights.adapter_files import adapter_record, save_adapter
from finchtune.weights.base import load_model
from finchtune.weights.pth import tensors_of
from finchtune.weights.tensors import read_tensors, write_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_load_as_they_were_written(tmp_path, dtype):
    weights = {name: t.to(dtype) for name, t in small_model().state_dict().items()}
    write_tensors(weights, tmp_path / "m.pth")
    model = load_model(tmp_path / "m.pth")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, weights[name]), name
    assert load_model(tmp_path / "m.pth", dtype=torch.float32).head.weight.dtype == torch.float32


def test_loading_keeps_the_file_mapped(tmp_path):
    path = save_model(small_model(), tmp_path / "m.pth")
    model = load_model(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    before = path.read_bytes()
    with torch.no_grad():
        model.head.weight.zero_()
    assert path.read_bytes() == before, "training must never write the base file"


def test_old_format_and_flat_vectors_load(tmp_path):
    weights = small_model().state_dict()
    flat = {n: t.flatten() if "time_maa_x" in n else t for n, t in weights.items()}
    torch.save(flat, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = load_model(tmp_path / "old.pth").state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/finchtune-evil", "w"))


def test_bad_files_are_refused_with_a_line(tmp_path):
    path = tmp_path / "bad.pth"
    with pytest.raises(UserError, match="no such file"):
        load_model(path)
    with open(path, "wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(UserError, match="could run code"):
        load_model(path)
    torch.save({"emb.weight": Evil()}, path)
    with pytest.raises(UserError, match="could run code"):
        load_model(path)
    torch.save({"shapes": {"emb.weight": torch.zeros(2)}}, path)
    with pytest.raises(UserError, match="entry 'shapes' is a dict; expected a flat dict"):
        load_model(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(UserError, match="holds a list"):
        load_model(path)
    torch.save({"layer.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"not a weight file of RWKV-6 .*layer.weight"):
        load_model(path)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, keep):
    path = save_model(small_model(), tmp_path / "m.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep >= 1 else int(len(whole) * keep)])
    with pytest.raises(UserError, match=r"m\.pth .*bytes\)"):
        load_model(path)


def test_misfits_are_listed(tmp_path):
    weights = small_model().state_dict()
    weights["blocks.0.ffn.extra"] = torch.zeros(1)
    del weights["blocks.1.att.key.weight"]
    weights["head.weight"] = torch.zeros(256, 60)
    write_tensors(weights, tmp_path / "m.pth")
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "m.pth")
    text = str(error.value)
    assert "blocks.1.att.key.weight is missing" in text
    assert "blocks.0.ffn.extra is not known" in text
    assert "head.weight is [256, 60] instead of [256, 64]" in text


def test_adapters_with_nan_are_not_written(tmp_path):
    with pytest.raises(UserError, match="holds NaN"):
        save_adapter({"a": torch.tensor([torch.nan])}, {}, tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_an_adapter_is_seen(tmp_path):
    path = tmp_path / "rwkv-0.pth"
    save_adapter({"a": torch.randn(1000)}, {"adapter": {}}, path)
    assert set(adapter_record(path)) == {"adapter", "sha256"}
    flip_a_bit(path)
    assert read_tensors(path).keys() == {"a"}, "torch does not see it"
    with pytest.raises(UserError, match=r"rwkv-0\.pth \(.* bytes\) does not match its checksum"):
        adapter_record(path)


def test_failed_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    write_tensors({"a": torch.zeros(2)}, path)
    with pytest.raises(RuntimeError):
        write_tensors({"a": torch.zeros(2, device="meta")}, path)
    assert torch.equal(read_tensors(path)["a"], torch.zeros(2))
    assert list(tmp_path.iterdir()) == [path]


def test_newest_intact_checkpoint_is_found(tmp_path):
    for step in (5, 10, 20):
        state = {"trained": {"a": torch.ones(1) * step}}
        save_checkpoint(tmp_path, step, state, tensors_of(state), {"k": 1})
    (tmp_path / "step-30").mkdir()
    flip_a_bit(tmp_path / "step-20" / "state.pth")
    found, skipped = newest_checkpoint(tmp_path)
    assert found == tmp_path / "step-10"
    assert "step-30" in skipped[0]
    assert "step-20 is passed over: state.pth (" in skipped[1]
    state, manifest = load_checkpoint(found)
    assert state["trained"]["a"] == 10
    assert (manifest["step"], manifest["k"]) == (10, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("3B", "names of released models are for `plan`"),
        ("BlinkDL/rwkv-6-world", "nothing is downloaded here"),
        ("https://huggingface.co/a/b", "nothing is downloaded here"),
        ("models/base.pth", r"base\.pth: no such file$"),
        ("nowhere", "nowhere: no such file$"),
    ],
)
def test_names_that_are_no_files_are_explained(name, message):
    with pytest.raises(UserError, match=message):
        load_model(name)
