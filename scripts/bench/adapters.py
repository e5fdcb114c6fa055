"""Time and memory of each adapter method on one linear layer, against the frozen layer alone.

Forward and backward of x (T, in) through a frozen W (out, in), its methods alternating so that
all see the same machine. "built" is the straightforward Bat, which builds its changed weight in
every forward. Nothing here is a claim about a whole model.
"""

import argparse
import ctypes
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finchtune.adapters import get_method
from finchtune.errors import UserError, run_cli
from finchtune.files import write_json

MIB = 2**20


class Frozen(nn.Module):
    """The layer without an adapter."""

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        return F.linear(x, W)


class BuiltBat(nn.Module):
    """Bat as its formula reads: autograd keeps what building W' and multiplying with it needs."""

    def __init__(self, in_features: int, out_features: int, mode: str, r: int = 64) -> None:
        super().__init__()
        self.r, self.mode = r, mode
        count = (in_features if mode == "row" else out_features) // r
        self.bone = nn.Parameter(torch.zeros(count, r, r))

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        blocks = W.view(W.shape[0] // self.r, self.r, -1, self.r).transpose(1, 2)
        D = self.bone if self.mode == "row" else self.bone.unsqueeze(1)
        changed = blocks + blocks @ D + D
        return F.linear(x, changed.transpose(1, 2).reshape(W.shape))


METHODS: dict[str, Callable[[int, int], nn.Module]] = {
    "frozen": lambda k, d: Frozen(),
    "bone": lambda k, d: get_method("bone")(k, d, r=64),
    "bat_row": lambda k, d: get_method("bat")(k, d, r=64, mode="row"),
    "bat_row_built": lambda k, d: BuiltBat(k, d, "row"),
    "bat_col": lambda k, d: get_method("bat")(k, d, r=64, mode="col"),
    "bat_col_built": lambda k, d: BuiltBat(k, d, "col"),
    "lora": lambda k, d: get_method("lora")(k, d, r=32),
    "pissa": lambda k, d: get_method("pissa")(k, d, r=32),
    "dora": lambda k, d: get_method("dora")(k, d, r=32),
    "disha": lambda k, d: get_method("disha")(k, d, r1=64, r2=64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass
class Row:
    """One method on one layer; times are medians in ms, memory in MiB."""

    n_embd: int
    layer: str
    tokens: int
    dtype: str
    method: str
    forward_ms: float
    backward_ms: float
    relative: float
    """Median of the time over that of the frozen layer in the same turn."""
    saved_mib: float
    """What autograd keeps for backward, x included; W and the adapter's tensors are not."""
    peak_mib: float | None
    """Highest use of memory in one forward and backward over that before it."""


def main() -> None:
    given = parse()
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = []
    for C, layer, dtype, T in product(given.n_embd, given.layers, given.dtypes, given.tokens):
        print(f"\nn_embd {C}, {layer}, {dtype}, {T} tokens, {device}")
        print("method            fwd ms    bwd ms  relative  saved MiB  peak MiB")
        for row in measure(C, layer, T, dtype, device, given.methods, given.repeats):
            peak = "-" if row.peak_mib is None else f"{row.peak_mib:.1f}"
            times = f"{row.forward_ms:9.2f} {row.backward_ms:9.2f} {row.relative:9.3f}"
            print(f"{row.method:14} {times} {row.saved_mib:10.2f} {peak:>9}", flush=True)
            rows.append(dataclasses.asdict(row))
    if given.json:
        machine = {
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "repeats": given.repeats,
        }
        write_json(given.json, machine | {"rows": rows})


def parse() -> argparse.Namespace:
    """The command line, with a method or dtype that does not exist refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--n_embd", nargs="+", type=int, default=[2560, 4096])
    parser.add_argument(
        "--layers",
        nargs="+",
        default=["key", "value"],
        choices=["square", "key", "value"],
        help="the FFN's key (n_embd to 3.5 n_embd) and value (back); square: an attention linear",
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=5, help="after a first, uncounted one")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", help="also write the figures to this file")
    given = parser.parse_args()
    if any(n % 64 for n in given.n_embd):
        raise UserError("--n_embd must be multiples of 64, the rank of Bat's blocks")
    if given.repeats < 1:
        raise UserError("--repeats must be at least 1")
    return given


def measure(
    C: int, layer: str, T: int, dtype: str, device: str, names: list[str], repeats: int
) -> list[Row]:
    """Every named method on one layer, one row each."""
    ffn = int(3.5 * C) // 64 * 64
    d, k = {"square": (C, C), "key": (ffn, C), "value": (C, ffn)}[layer]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DTYPES[dtype], device=device)

    W = nn.Parameter(random(d, k) / k**0.5, requires_grad=False)
    x, dy = random(1, T, k).requires_grad_(), random(1, T, d)
    names = ["frozen", *(name for name in names if name != "frozen")]
    modules = {name: METHODS[name](k, d).to(W) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        for name in names:
            times[name].append(timed(modules[name], x, W, dy))
    base = [sum(pair) for pair in times["frozen"][1:]]
    rows = []
    for name in names:
        pairs = times[name][1:]
        forward, backward = (statistics.median(part) * 1e3 for part in zip(*pairs, strict=True))
        relative = statistics.median(sum(p) / b for p, b in zip(pairs, base, strict=True))
        saved = saved_bytes(modules[name], x, W) / MIB
        peak = peak_bytes(modules[name], x, W, dy)
        peak_mib = None if peak is None else peak / MIB
        rows.append(Row(C, layer, T, dtype, name, forward, backward, relative, saved, peak_mib))
    return rows


def timed(module: nn.Module, x: Tensor, W: Tensor, dy: Tensor) -> tuple[float, float]:
    """Seconds of one forward and of one backward."""
    x.grad = None
    module.zero_grad()
    start = clock(x)
    y = module(x, W)
    middle = clock(x)
    y.backward(dy)
    return middle - start, clock(x) - middle


def clock(x: Tensor) -> float:
    """Seconds, once the device has done all it was given."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def saved_bytes(module: nn.Module, x: Tensor, W: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, without W and parameters."""
    known = {t.untyped_storage().data_ptr() for t in [W, *module.state_dict().values()]}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x, W)
    del y
    return sum(found.values())


def peak_bytes(module: nn.Module, x: Tensor, W: Tensor, dy: Tensor) -> int | None:
    """Bytes in use at most during forward and backward, over those before; None if unknown."""
    x.grad = None
    module.zero_grad()
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(module, x, W, dy)
        return torch.cuda.max_memory_allocated() - before
    try:
        # Memory that was freed before but not given back would hide the peak.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError, TypeError):
        return None
    before = process_memory("VmRSS")
    timed(module, x, W, dy)
    return process_memory("VmHWM") - before


def process_memory(field: str) -> int:
    """Bytes of this process that /proc/self/status gives under `field`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    run_cli(main)
