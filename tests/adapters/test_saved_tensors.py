"""What the methods keep for backward, counted as autograd packs it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finchtune.adapters import METHODS

OUT, IN, TOKENS, R = 48, 32, 10, 4


def kept(module, x, W):
    """Storages kept for backward, other than those of W and the adapter: name -> elements."""
    known = {p.untyped_storage().data_ptr() for p in [W, *module.state_dict().values()]}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage().data_ptr()
        if storage not in known:
            name = "x" if storage == x.untyped_storage().data_ptr() else storage
            found[name] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x, W)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "settings", "keeps_x", "others"),
    [
        ("bone", {"r": R}, False, [TOKENS * R]),
        ("bone", {"r": 5}, False, [TOKENS * 5]),
        ("disha", {"r1": 6, "r2": R}, False, [TOKENS * R]),
        ("bat", {"r": R}, True, []),
        ("bat", {"r": R, "mode": "col"}, True, []),
        ("lora", {"r": R}, True, [TOKENS * R]),
        ("pissa", {"r": R}, True, [TOKENS * R]),
    ],
)
def test_keeps_no_more_than_needed(name, settings, keeps_x, others, dtype):
    adapter = METHODS[name](IN, OUT, **settings).to(dtype)
    W = nn.Parameter(torch.randn(OUT, IN).to(dtype), requires_grad=False)
    adapter.init(W)
    x = torch.randn(2, TOKENS // 2, IN).to(dtype).requires_grad_()
    found = kept(adapter, x, W)
    assert ("x" in found) == keeps_x
    assert [n for key, n in found.items() if key != "x"] == others


def test_counting_sees_a_built_weight():
    class BuiltWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.delta = nn.Parameter(torch.zeros(OUT, IN))

        def forward(self, x, W):
            return F.linear(x, W + self.delta)

    W = nn.Parameter(torch.randn(OUT, IN), requires_grad=False)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    assert OUT * IN in kept(BuiltWeight(), x, W).values()
