"""Time and memory of a training step, against a lower bound: the base's matrix products alone.

    python scripts/bench/train.py                        # every table
    python scripts/bench/train.py --tables step --quick  # one of them, with fewer repeats

The lower bound multiplies tensors of the step's own shapes by the base's own weights: forward, and
backward by the inputs where they need a gradient (by the weights too where those are trained),
the forward of the blocks twice under --grad_cp 1. Step and bound alternate in one process, and
every row has a process of its own, so that its peak memory is its own. "step MiB" is the highest
use of memory during a step over that before it, "all MiB" the highest of the whole process.

Tables: step (L12 C512, the loss in chunks and over whole logits), methods, sizes, length and
batch (how cost grows with T and B), overhead (DeepSpeed's step against a bare loop).
"""

import argparse
import copy
import dataclasses
import multiprocessing
import platform
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from random_models import add_generation, sizes_of
from torch import Tensor, nn

from finchtune import distributed
from finchtune.adapters import QuantisedWeight, attach
from finchtune.errors import UserError, run_cli
from finchtune.files import write_json
from finchtune.memory.measure import MIB, peak_bytes, seconds
from finchtune.models import LanguageModel, meta_model
from finchtune.ops import cross_entropy as loss
from finchtune.training.optim import adamw, parameter_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "bone": {"r": 64},
    "bat": {"r": 64, "mode": "row"},
    "bat_col": {"r": 64, "mode": "col"},
    "lora": {"r": 32, "alpha": 32.0},
}


@dataclass(frozen=True)
class Case:
    """One row: a step of one model with one method."""

    n_layer: int = 12
    n_embd: int = 512
    vocab_size: int = 65536
    ctx_len: int = 512
    micro_bsz: int = 1
    peft: str = "bone"
    precision: str = "fp32"
    grad_cp: int = 0
    loss: str = "chunked"
    against: str = "bound"
    quant: str | None = None
    generation: int = 6


SMALL = Case(n_layer=6, n_embd=256, vocab_size=65536, ctx_len=256)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
TABLES: dict[str, list[Case]] = {
    "step": [Case(loss=kind, grad_cp=cp) for cp in (0, 1, 2) for kind in ("chunked", "whole")],
    "methods": [Case(peft=m, grad_cp=cp) for m in METHODS if m != "bat_col" for cp in (0, 1, 2)],
    "sizes": [SMALL, Case(), Case(n_embd=1024)],
    "length": [replace(SMALL, ctx_len=T, micro_bsz=max(LENGTHS) // T) for T in LENGTHS],
    "batch": [replace(SMALL, micro_bsz=B) for B in (1, 2, 4, 8)],
    "overhead": [replace(SMALL, against="deepspeed")],
}


def main() -> None:
    given = parse()
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for table in given.tables:
        print(f"\n{table}, {device}\n{HEADER}")
        cases = [c for c in TABLES[table] if table != "length" or c.ctx_len in given.lengths]
        cases = [replace(c, generation=given.generation) for c in cases]
        for case in (replace(c, precision=p) for p in given.dtypes for c in cases):
            # A process of its own: what one row leaves in memory is not counted in the next.
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, spawn) as pool:
                row = pool.submit(measure, case, device, given.threads, given.repeats).result()
            print(line(case, row), flush=True)
            rows.append({"table": table} | dataclasses.asdict(case) | row)
    if given.json:
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
        machine = {"device": name, "torch": torch.__version__, "threads": given.threads}
        write_json(given.json, machine | {"repeats": given.repeats, "rows": rows})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_generation(parser)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, choices=LENGTHS,
                        help="those of the table length")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7, help="after a first, uncounted one")
    parser.add_argument("--quick", action="store_true", help="3 repeats")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--json", help="also write the figures to this file")
    given = parser.parse_args()
    given.repeats = 3 if given.quick else given.repeats
    if given.repeats < 1:
        raise UserError("--repeats must be at least 1")
    return given


HEADER = (
    "L   C     V      T     B   method dtype cp  loss     "
    "step ms  against ms  ratio  tokens/s  step MiB  all MiB"
)


def line(case: Case, row: dict[str, float]) -> str:
    """One row of a table, under HEADER."""
    return (
        f"{case.n_layer:<3} {case.n_embd:<5} {case.vocab_size:<6} {case.ctx_len:<5} "
        f"{case.micro_bsz:<3} {case.peft:6} {case.precision:5} {case.grad_cp:<3} {case.loss:8} "
        f"{row['step_ms']:8.1f} {row['against_ms']:10.1f} {row['ratio']:7.3f} "
        f"{row['tokens_per_s']:9.0f} {row['step_mib']:9.1f} {row['all_mib']:8.1f}"
    )


def measure(case: Case, device_name: str, threads: int, repeats: int) -> dict[str, float]:
    """One row's figures: medians over `repeats` of the step and what it is held against."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(device_name)
    model = random_model(case, device)
    tokens, labels = torch.randint(
        case.vocab_size, (2, case.micro_bsz, case.ctx_len), device=device
    )
    other: Callable[[], object]
    if case.against == "deepspeed":
        step = deepspeed_step(case, copy.deepcopy(model), tokens, labels)
        other = BareLoop(case, model, tokens, labels)
    else:
        step, other = BareLoop(case, model, tokens, labels), LowerBound(case, model)
    step()
    before, peak = peak_bytes(step, device)
    other()
    pairs = [(seconds(step, device), seconds(other, device)) for _ in range(repeats)]
    step_s, other_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "step_ms": step_s * 1e3,
        "against_ms": other_s * 1e3,
        "ratio": statistics.median(a / b for a, b in pairs),
        "tokens_per_s": tokens.numel() / step_s,
        "step_mib": (peak - before) / MIB,
        "all_mib": peak / MIB,
    }


def random_model(case: Case, device: torch.device) -> LanguageModel:
    """A model with its adapters, filled at random; orthogonal matrices would take minutes."""
    sizes = sizes_of(case.generation, case.n_layer, case.n_embd, case.vocab_size)
    model = meta_model(sizes, case.grad_cp).to(DTYPES[case.precision]).to_empty(device=device)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.02)
    if case.peft == "none":
        return model
    return attach(model, case.peft.removesuffix("_col"), quant=case.quant, **METHODS[case.peft])


def deepspeed_step(
    case: Case, model: LanguageModel, tokens: Tensor, labels: Tensor
) -> Callable[[], object]:
    """A step as train.py makes it."""
    from finchtune.config import TrainConfig
    from finchtune.data.batch import Batch
    from finchtune.training.engine import Engine

    device = tokens.device
    distributed.init_process_group(device)
    engine = Engine(model, TrainConfig(peft=case.peft, micro_bsz=case.micro_bsz), device)
    return lambda: engine.step([Batch(tokens, labels)], 1e-4)


class BareLoop:
    """The same step in plain torch: fp32 master weights of bf16 tensors, clipping, AdamW."""

    def __init__(self, case: Case, model: LanguageModel, tokens: Tensor, labels: Tensor):
        self.case, self.model, self.tokens, self.labels = case, model, tokens, labels
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.master_weights = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for p in self.trained
        ]
        named = ((str(i), p) for i, p in enumerate(self.master_weights))
        self.optimizer = adamw(parameter_groups(named), 1e-4, (0.9, 0.99), 1e-8)

    def loss(self) -> Tensor:
        if self.case.loss == "chunked":
            return self.model.loss(self.tokens, self.labels)[0]
        logits, _ = self.model(self.tokens)
        return F.cross_entropy(logits.flatten(0, 1), self.labels.flatten(), reduction="sum")

    def __call__(self) -> float:
        total = self.loss()
        (total / self.labels.numel()).backward()
        for p, master in zip(self.trained, self.master_weights, strict=True):
            if p is not master:
                assert p.grad is not None
                master.grad, p.grad = p.grad.float(), None
        nn.utils.clip_grad_norm_(self.master_weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for p, master in zip(self.trained, self.master_weights, strict=True):
                if p is not master:
                    p.copy_(master)
        return total.item()


class LowerBound:
    """The matrix products of the base that no implementation of the step can leave out."""

    def __init__(self, case: Case, model: LanguageModel):
        self.full = case.peft == "none"
        self.again = case.grad_cp == 1
        self.tokens = case.micro_bsz * case.ctx_len
        self.head = model.head.weight.T
        self.buffers: dict[tuple, Tensor] = {}
        self.gated = hasattr(model.blocks[0].ffn, "receptance")
        self.blocks = [list(self.block_products(block)) for block in model.blocks]

    def block_products(self, block: nn.Module) -> Iterator[tuple[Tensor, bool]]:
        """(weight (..., in, out), whether in the first block its input holds nothing trained)."""
        for name, low_rank in block.att.named_parameters(recurse=False):
            if name[-1] in "12":
                yield low_rank.detach(), True
        for part in (block.att, block.ffn):
            for name, layer in part.named_children():
                if name != "ln_x":
                    yield self.dense(layer.weight).T, part is block.att and name != "output"

    def dense(self, weight: Tensor | QuantisedWeight) -> Tensor:
        """The weight; in place of a quantised one a random tensor, the same for all of a shape."""
        if isinstance(weight, Tensor):
            return weight.detach()
        _, shape = weight.form
        if shape not in self.buffers:
            self.buffers[shape] = self.head.new_empty(shape).normal_()
        return self.buffers[shape]

    def buffer(self, weight: Tensor, rows: int, side: int) -> Tensor:
        """A fixed random input, or gradient of an output, of a product with `weight`."""
        shape = (*weight.shape[:-2], rows, weight.shape[side])
        if shape not in self.buffers:
            self.buffers[shape] = torch.randn(shape, device=weight.device).to(weight.dtype)
        return self.buffers[shape]

    def forward(self, weight: Tensor, rows: int) -> None:
        self.buffer(weight, rows, -2) @ weight

    def backward(self, weight: Tensor, rows: int, by_input: bool) -> None:
        dy = self.buffer(weight, rows, -1)
        if by_input:
            dy @ weight.mT
        if self.full:
            self.buffer(weight, rows, -2).mT @ dy

    @torch.no_grad()
    def __call__(self) -> None:
        for products in self.blocks:
            for weight, _ in products:
                self.forward(weight, self.tokens)
        chunk = min(self.tokens, loss.CHUNK_ELEMENTS[self.head.device.type] // self.head.shape[-1])
        for _ in range(0, self.tokens, chunk):
            self.forward(self.head, chunk)
            self.backward(self.head, chunk, True)
        for layer, products in reversed(list(enumerate(self.blocks))):
            # Backward needs no term of a sum: a last product that is only added is not made again.
            again = products if self.gated else products[:-1]
            for weight, _ in again if self.again else ():
                self.forward(weight, self.tokens)
            for weight, reads_embedding in products:
                # Below the first adapter nothing is trained, so nothing needs a gradient.
                self.backward(weight, self.tokens, self.full or layer > 0 or not reads_embedding)


if __name__ == "__main__":
    run_cli(main)
