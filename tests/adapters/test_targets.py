"""Adapters on some of a block's linears: chosen by names, and known again from files."""

import pytest
import torch
from helpers.adapted import make_adapter
from helpers.support import relative_error, small_model

from finchtune.adapters import adapted_layers, attach, block_targets, targets_of
from finchtune.errors import UserError
from finchtune.tokenizer import load_tokenizer
from finchtune.weights.adapter_files import adapter_record, read_adapter
from finchtune.weights.base import load_model
from finchtune.weights.exporting import export_adapter
from finchtune.weights.forms import FORMS, Settings
from finchtune.weights.merging import merge_files
from finchtune.weights.writing import writing_model

ALL = ["att.receptance", "att.key", "att.value", "att.gate", "att.output",
       "ffn.key", "ffn.receptance", "ffn.value"]  # fmt: skip
SIZES = {"n_layer": 4, "n_embd": 64, "head_size": 16}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ALL),
        (["att", "ffn"], ALL),
        (["att"], ALL[:5]),
        (["ffn.key"], ["ffn.key"]),
        (["value", "att.key"], ["att.key", "att.value", "ffn.value"]),
    ],
    ids=str,
)
def test_names_choose_linears(names, expected):
    model = attach(small_model(), "lora", r=4, targets=block_targets(names))
    layers = adapted_layers(model)
    assert set(layers) == {f"blocks.{i}.{name}" for i in range(2) for name in expected}
    assert targets_of(layers) == ([] if expected == ALL else expected)


def test_names_of_nothing_are_refused():
    for name in ("attn", "", "blocks.0.att"):
        with pytest.raises(UserError, match=f"`target` {name}: known are att, ffn, att.receptance"):
            block_targets(["att", name])


def partial(folder):
    places = block_targets(["att", "ffn.key"])
    return make_adapter(folder, "lora", {"r": 4, "alpha": 8.0, "targets": places}, sizes=SIZES)


def test_merging_changes_what_was_chosen_and_nothing_else(tmp_path):
    base, model, adapter = partial(tmp_path)
    receipt = merge_files(base, adapter, tmp_path / "m.pth")
    assert receipt["merged"] == 4 * 6
    assert targets_of(key.removesuffix(".weight") for key in receipt["largest_change"]) == [
        *ALL[:5], "ffn.key"
    ]  # fmt: skip
    tokens = torch.randint(1, 256, (1, 20))
    assert relative_error(load_model(tmp_path / "m.pth")(tokens)[0], model(tokens)[0]) < 1e-5


@pytest.mark.parametrize("name", [form.name for form in FORMS.values() if form.write_adapter])
def test_other_software_takes_and_gives_them(tmp_path, name):
    """What comes back names no layers but those that it has; unmerged it computes the same."""
    base, model, adapter = partial(tmp_path)
    form = FORMS[name]
    output = tmp_path / f"there{form.suffix}"
    dtype = "fp32" if "fp32" in form.dtypes else "fp16"
    export_adapter(base, adapter, output, form, Settings(dtype, "small", load_tokenizer("bytes")))
    assert read_adapter(output).keys() == read_adapter(adapter).keys()
    assert adapter_record(output)["adapter"]["method"] == "lora"
    tokens = torch.randint(1, 256, (1, 20))
    found = writing_model(base, output)(tokens)[0]
    assert relative_error(found, model(tokens)[0]) < (1e-5 if dtype == "fp32" else 1e-2)
