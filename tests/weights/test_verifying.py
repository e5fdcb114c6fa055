"""Texts that a merged file is verified on."""

import pytest
from helpers.adapted import make_adapter

from finchtune.errors import UserError
from finchtune.weights.adapter_files import read_adapter
from finchtune.weights.merging import merge_files
from finchtune.weights.verifying import verify


def test_a_text_may_be_longer_than_a_file_name(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    receipt = merge_files(base, adapter, tmp_path / "merged.pth")
    given = (base, read_adapter(adapter), receipt["adapter_spec"], tmp_path / "merged.pth")
    assert "verified on 300 tokens" in verify(*given, "x" * 300)
    with pytest.raises(UserError, match="`verify` needs a text"):
        verify(*given, "")


def test_a_base_in_fp8_is_verified_without_rounding_activations(tmp_path):
    sizes = {"n_embd": 128, "dim_ffn": 448}
    given = {"r": 8, "quant": "fp8_compute"}
    base, model, adapter = make_adapter(tmp_path, "bone", given, sizes=sizes)
    merged = tmp_path / "merged.pth"
    merge_files(base, adapter, merged)
    line = verify(base, read_adapter(adapter), model.adapter_spec, merged, "Some text.")
    assert "verified on 10 tokens" in line
