"""What an adapter file says of itself, and what has to be said of one that says nothing."""

import json
import shutil
import zipfile

import pytest
import torch
from helpers.adapted import METHODS, make_adapter
from helpers.kills import kill_everywhere
from helpers.support import relative_error, rwkv_package_logits, small_model

from finchtune.adapters import attach
from finchtune.errors import UserError
from finchtune.files import remove, remove_leftovers, sha256
from finchtune.weights.adapter_files import adapter_keys, adapter_record, save_adapter
from finchtune.weights.base import load_model
from finchtune.weights.merging import merge_files
from finchtune.weights.tensors import write_tensors
from finchtune.weights.unmerging import read_receipt


def test_the_record_is_in_the_file_where_other_readers_do_not_look(tmp_path):
    tensors = small_model().state_dict()
    record = {"adapter": {"targets": "芬奇"}, "base": {"file": "b", "sha256": "0"}}
    save_adapter(tensors, record | {"config": {"proj_dir": "a"}}, tmp_path / "with.pth")
    (tmp_path / "with.json").unlink()
    write_tensors(tensors, tmp_path / "without.pth")
    assert adapter_record(tmp_path / "with.pth") == record
    for mmap in (False, True):
        found = torch.load(tmp_path / "with.pth", weights_only=True, mmap=mmap)
        assert list(found) == list(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    logits = [rwkv_package_logits(tmp_path / f"{n}.pth", [5, 6, 7]) for n in ("with", "without")]
    assert torch.equal(*logits)
    assert zipfile.ZipFile(tmp_path / "with.pth").testzip() is None
    save_adapter(tensors, record | {"config": {"proj_dir": "b"}}, tmp_path / "again.pth")
    assert sha256(tmp_path / "again.pth") == sha256(tmp_path / "with.pth"), "of another run"
    renamed = shutil.copy(tmp_path / "with.pth", tmp_path / "a name.pth")
    assert adapter_record(renamed) == record


def test_a_record_survives_without_its_json_and_a_flipped_bit_is_seen(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "olora", {"r": 4, "alpha": 64})
    merge_files(base, adapter, tmp_path / "with.pth")
    adapter.with_suffix(".json").unlink()
    merge_files(base, adapter, tmp_path / "without.pth")
    assert sha256(tmp_path / "with.pth") == sha256(tmp_path / "without.pth")
    content = bytearray(adapter.read_bytes())
    tensor = torch.load(adapter)["blocks.1.ffn.key.lora_B"]
    content[content.index(tensor.numpy().tobytes())] ^= 1
    adapter.write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksums"):
        merge_files(base, adapter, tmp_path / "flipped.pth")


def test_two_records_that_differ_are_refused(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "lora", {"r": 4, "alpha": 64})
    path = adapter.with_suffix(".json")
    record = json.loads(path.read_text())
    record["adapter"]["alpha"] = 32
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"differs from the record in rwkv-0\.pth itself"):
        merge_files(base, adapter, tmp_path / "merged.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": 5}, "is no record of an adapter"),
        ({"adapter": {"method": []}}, "is no record of an adapter"),
        ({"base": []}, "is no record of an adapter"),
        ({"format": "finchtune 2"}, "the record's format is 'finchtune 2'"),
    ],
)
def test_a_json_that_is_no_record_is_refused(tmp_path, change, message):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    path = adapter.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        merge_files(base, adapter, tmp_path / "merged.pth")
    path.write_text("[]")
    with pytest.raises(UserError, match="is no record of an adapter"):
        adapter_record(adapter)


OPEN = {
    "olora": ({"r": 4, "alpha": 64}, "method, alpha, quant; give `method` lora_ga|olora|pissa"),
    "lora_ga": ({"r": 4, "alpha": 64}, "method, alpha, quant"),
    "pissa": ({"r": 4}, "method, alpha, quant"),
    "lora": ({"r": 4, "alpha": 64, "rslora": True}, "alpha, rslora, quant; give `lora_alpha`"),
    "dora": ({"r": 4, "alpha": 64}, "alpha, quant"),
    "bat": ({"r": 8, "mode": "col"}, "mode, quant; give `bat_mode` row or col `quant` none"),
    "bone": ({"r": 8, "quant": "nf4"}, "quant; give `quant` none or its form"),
    "disha": ({"r1": 8, "r2": 4}, "quant"),
}


@pytest.mark.parametrize("method", OPEN)
def test_what_no_tensor_holds_is_never_guessed(tmp_path, method):
    """Stated in full, the file merges to what the adapted model computes."""
    settings, message = OPEN[method]
    quant = settings.get("quant")
    base, _, _ = make_adapter(tmp_path, "bone", {"r": 8})
    model = attach(load_model(base), method, init=method != "lora_ga", **settings)
    with torch.no_grad():
        for tensor in [p for p in model.parameters() if p.requires_grad]:
            tensor.add_(0.05 * torch.randn_like(tensor))
    adapter = tmp_path / "bare.pth"
    tensors = {key: model.state_dict()[name] for name, key in adapter_keys(model).items()}
    write_tensors(tensors, adapter)
    stated = {k: v for k, v in settings.items() if k in ("alpha", "rslora", "mode")}
    stated |= {"method": method, "quant": quant or "none"}
    with pytest.raises(UserError) as error:
        merge_files(base, adapter, tmp_path / "merged.pth")
    assert message in str(error.value)
    merge_files(base, adapter, tmp_path / "merged.pth", stated=stated)
    tokens = torch.randint(1, 256, (1, 40))
    merged = load_model(tmp_path / "merged.pth")(tokens)[0]
    assert relative_error(merged, model(tokens)[0]) < 1e-4


def test_what_is_stated_may_not_contradict_the_file(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "lora", {"r": 4, "alpha": 64})
    for stated in ({"alpha": 32}, {"rslora": True}, {"method": "bone"}, {"quant": "nf4"}):
        with pytest.raises(UserError, match=r"the record of .*rwkv-0\.pth says"):
            merge_files(base, adapter, tmp_path / "merged.pth", stated=stated)
    with pytest.raises(UserError, match="`bat_mode` is no setting of lora"):
        merge_files(base, adapter, tmp_path / "merged.pth", stated={"mode": "row"})
    merge_files(base, adapter, tmp_path / "merged.pth", stated={"alpha": 64, "method": "lora"})
    write_tensors(torch.load(adapter), adapter)
    remove(adapter.with_suffix(".json"))
    with pytest.raises(UserError, match=r"its tensors \(lora_A, lora_B\) are lora"):
        merge_files(base, adapter, tmp_path / "merged.pth", stated={"method": "bone"})
    stated = {"alpha": 64, "rslora": False, "quant": "none"}
    with pytest.raises(UserError, match="`bat_mode` is no setting of lora"):
        merge_files(base, adapter, tmp_path / "merged.pth", stated=stated | {"mode": "row"})
    merge_files(base, adapter, tmp_path / "merged.pth", stated=stated)


def test_weights_and_receipt_appear_together_whenever_merging_is_killed(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", METHODS["bone"])
    out = tmp_path / "out"
    out.mkdir()
    merge_files(base, adapter, out / "m.pth")
    new = {path.name: sha256(path) for path in out.iterdir()}
    merge_files(base, adapter, out / "other.pth")
    old = {"m.pth": sha256(base), "m.merge.json": ""}

    def put_back():
        for path in out.iterdir():
            remove(path)
        shutil.copy(base, out / "m.pth")
        (out / "m.merge.json").write_text('{"output": "old"}')

    put_back()
    old["m.merge.json"] = sha256(out / "m.merge.json")
    states = []
    for _ in kill_everywhere(lambda: merge_files(base, adapter, out / "m.pth"), out):
        remove_leftovers(out)
        states.append({path.name: sha256(path) for path in out.iterdir()})
        put_back()
    assert all(state in (old, new) for state in states)
    assert old in states
    assert new in states


def test_each_form_has_a_receipt_of_its_own(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    for name in ("m.pth", "m.safetensors"):
        merge_files(base, adapter, tmp_path / name)
    for name in ("m.pth", "m.safetensors"):
        assert read_receipt(tmp_path / name)["output"]["file"] == name


def test_a_json_of_the_user_is_not_replaced(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    (tmp_path / "m.merge.json").write_text('{"notes": "precious"}')
    with pytest.raises(UserError, match="was not written by finchtune"):
        merge_files(base, adapter, tmp_path / "m.pth")
    (tmp_path / "mine.json").write_text('{"notes": "precious"}')
    with pytest.raises(UserError, match="was not written by finchtune"):
        save_adapter({"a": torch.zeros(2)}, {"adapter": {}}, tmp_path / "mine.pth")
    assert not (tmp_path / "m.pth").exists()
    assert not (tmp_path / "mine.pth").exists()
