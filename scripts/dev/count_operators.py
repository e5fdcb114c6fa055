"""Operator calls of a training step for each model block, counted on fake tensors.

    python scripts/dev/count_operators.py
    python scripts/dev/count_operators.py --generations 7 --methods bone --grad_cp 1 --list

A call is one that Python or autograd makes of a torch operator which is neither a view nor an
allocation; each costs the processor some 5 to 20 microseconds, whatever its size. "launches" are
the kernels that these calls start on a GPU, as read off cuda/operators. Each is counted with plain
torch ("before") and with the compiled operators ("now"), as the difference between models of three
and of two blocks, so that embedding and loss fall out. The tensors are a CPU's that stand for a
GPU's: bf16, 4 x 512 tokens of a 3B model.
"""

import argparse
import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finchtune.adapters import attach
from finchtune.errors import run_cli
from finchtune.files import write_json
from finchtune.memory.estimate import materialise
from finchtune.models.generations import by_number, meta_model
from finchtune.ops.kernels import cpu_standing_for, kernels_set_aside

METHODS: dict[str, dict[str, Any]] = {
    "bone": {"method": "bone", "r": 64},
    "bat_row": {"method": "bat", "r": 64, "mode": "row"},
    "lora": {"method": "lora", "r": 64},
}
B, T, C = 4, 512, 2560
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach"}
# Kernels that an operator of cuda/operators starts with frozen weights; all others start one.
LAUNCHES = {
    "bone": 3,  # sums, W, D
    "bone_backward": 4,  # W, D, sums, the gradient of D
    "bat_row": 4,  # the shards' product, moves and sums, W, sums
    "bat_row_backward": 5,  # W, sums, gathering, two products of the shards
    "product_plus": 2,
    "mixtures": 10,  # blend, two low-rank products (one for each mixture), tanh, stack, blends
    "mixtures_backward": 7,
    "fixed_mixtures": 2,
    "fixed_mixtures_backward": 3,
}
GENERATIONS = by_number()


def launches_of(name: str, inputs: tuple[Any, ...]) -> int:
    """The kernels that a call starts."""
    if name.startswith("low_ranks"):  # two products for each part, and an activation but for some
        activations = inputs[5 if name.endswith("backward") else 4]
        return sum(3 if activation else 2 for activation in activations)
    return LAUNCHES.get(name, 1)


@dataclass
class Calls(TorchDispatchMode):
    """Counts while it is on."""

    names: Counter[str] = field(default_factory=Counter)
    launches: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        makes = func._schema.is_mutable or any(isinstance(x, Tensor) for x in tree_leaves(result))
        if makes and not func.is_view and name not in ALLOCATIONS:
            self.names[name] += 1
            self.launches += launches_of(name, args)
        return result


def step(generation: int, method: str, grad_cp: int, n_layer: int, compiled: bool) -> Calls:
    """The calls of a forward and a backward with an adapter on every linear, all else frozen."""
    sizes = GENERATIONS[generation].sizes(n_layer=n_layer, n_embd=C, vocab_size=65536)
    model = meta_model(sizes, grad_cp)
    with torch.device("meta"):
        attach(model, **METHODS[method])
    model.to(torch.bfloat16)
    aside = contextlib.nullcontext() if compiled else kernels_set_aside()
    with FakeTensorMode(), cpu_standing_for("cuda"), aside:
        materialise(model)
        tokens = torch.zeros(B, T, dtype=torch.int64)
        with Calls() as calls:
            loss, _ = model.loss(tokens, tokens)
            loss.backward()
    return calls


def per_block(generation: int, method: str, grad_cp: int, compiled: bool) -> dict[str, Any]:
    """What each block adds to a step: the number of calls, of each operator, and of launches."""
    two, three = (step(generation, method, grad_cp, n, compiled) for n in (2, 3))
    names = three.names - two.names
    return {
        "calls": names.total(),
        "launches": three.launches - two.launches,
        "names": dict(names.most_common()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = list(GENERATIONS)
    parser.add_argument("--generations", nargs="+", type=int, default=numbers, choices=numbers)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--grad_cp", nargs="+", type=int, default=[0, 1], choices=[0, 1, 2])
    parser.add_argument("--list", action="store_true", help="name the operators too")
    parser.add_argument("--json", help="also write the counts to this file")
    given = parser.parse_args()
    rows = []
    print(f"{'model':8}{'method':10}{'grad_cp':>8}{'form':>9}{'calls':>8}{'launches':>10}")
    for case in itertools.product(given.generations, given.methods, given.grad_cp):
        generation, method, grad_cp = case
        for form in ("before", "now"):
            found = per_block(*case, form == "now")
            named = {"generation": generation, "method": method, "grad_cp": grad_cp, "form": form}
            rows.append({**named, **found})
            counts = f"{found['calls']:8}{found['launches']:10}"
            print(f"RWKV-{generation:<3}{method:10}{grad_cp:8}{form:>9}{counts}")
            if given.list:
                print("  " + ", ".join(f"{name} {n}" for name, n in found["names"].items()))
    if given.json:
        write_json(given.json, rows)


if __name__ == "__main__":
    run_cli(main)
