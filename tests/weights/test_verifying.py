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
