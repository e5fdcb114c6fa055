"""The benchmark of a training step: its lower bound, and that a row can be measured."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from helpers.support import REPOSITORY
from torch.utils.flop_counter import FlopCounterMode

from finchtune.ops.kernels import has_kernels

SPEC = importlib.util.spec_from_file_location(
    "bench_train", REPOSITORY / "scripts" / "bench" / "train.py"
)
bench = importlib.util.module_from_spec(SPEC)
sys.modules["bench_train"] = bench  # where dataclasses look their module up
sys.path.append(str(REPOSITORY / "scripts" / "bench"))  # where it finds its helper
SPEC.loader.exec_module(bench)

TINY = bench.Case(n_layer=3, n_embd=64, vocab_size=512, ctx_len=64)


def flops(work):
    has_kernels("cpu")  # loads them: how they are counted is read as the counter is made
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("peft", ["none", "bone", "lora"])
@pytest.mark.parametrize("grad_cp", [0, 1])
@pytest.mark.parametrize("generation", [6, 7])
def test_the_lower_bound_is_the_steps_products_without_the_adapters(
    generation, peft, grad_cp, kernels
):
    case = replace(TINY, peft=peft, grad_cp=grad_cp, generation=generation)
    model = bench.random_model(case, torch.device("cpu"))
    step = bench.BareLoop(case, model, *torch.randint(512, (2, 1, 64)))
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".adapter." in n)
    # Forward, by the input, by the adapter's tensor, and once more for recomputation.
    own = 2 * case.ctx_len * adapters * (3 + grad_cp)
    found, bound = flops(step), flops(bench.LowerBound(case, model))
    assert bound <= found
    # Besides the adapters, a step makes one thin product of each block again in backward.
    assert bound > 0.93 * (found - own)


def test_a_row_has_every_figure():
    row = bench.measure(replace(TINY, loss="whole"), "cpu", torch.get_num_threads(), repeats=1)
    assert all(figure > 0 for figure in row.values())
    assert bench.line(TINY, row).startswith("3   64    512    64")
