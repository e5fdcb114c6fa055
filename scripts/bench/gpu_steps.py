"""Training steps of released sizes on one GPU: how fast, how full, how many launches.

    python scripts/bench/gpu_steps.py --sizes 3b --methods lora bone bat --shapes 4x512 1x512
    python scripts/bench/gpu_steps.py --sizes 7b --quant nf4 --grad_cp 1 --shapes 8x2048 --profile
    python scripts/bench/gpu_steps.py --methods bone --shapes 4x512 8x2048 --graphs 0 1
    python scripts/bench/gpu_steps.py --sizes 2.9b --shapes 4x512       # an RWKV-7
    python scripts/bench/gpu_steps.py --dry            # tiny sizes, on a CPU: does it run

Models are filled at random; a step is forward, backward, clipping and AdamW in plain torch. For
each combination of the flags: the median step, tokens/s, the share of the step that the base's
matrix products alone would take ("products", measured beside it), MFU (the products' operations
without recomputation, over the GPU's peak), the peak memory and the one that --plan's estimate
gives, what the allocator holds, and what a step launches: kernels and, of --graphs 1, CUDA graphs.
Memory within graphs counts as held only. On a CPU their work runs again in place of graphs.
A combination that fails, for want of memory for example, is noted and the next one follows; none
begins after --budget seconds.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from finchtune.config import TrainConfig
from finchtune.errors import UserError, run_cli
from finchtune.files import write_json
from finchtune.inference.generate import generate, generate_batch
from finchtune.memory.estimate import ModelPlan, activations
from finchtune.memory.measure import MIB, peak_bytes, seconds
from finchtune.models import generations
from finchtune.models.cuda_graph import Work
from finchtune.models.graphed_blocks import GraphedBlocks, cuda_graphs
from train import METHODS, BareLoop, Case, LowerBound, random_model

SIZES = {
    name.lower(): (one.number, sizes.n_layer, sizes.n_embd)
    for one in generations().values()
    for name, sizes in one.released.items()
}
TINY = (2, 128)
# Dense bf16 operations per second, from NVIDIA's data sheets; otherwise a large product's speed.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}


@dataclass(frozen=True)
class StepCase(Case):
    """One row."""

    graphs: int = 0


@dataclass(frozen=True)
class Bench:
    """What the rows share."""

    device: torch.device
    peak: float  # operations per second
    repeats: int
    profiled: int  # kernels to list for each row


def main() -> None:
    given = parse()
    device = torch.device("cpu" if given.dry else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device; --dry tries it on the CPU")
    began = time.monotonic()
    bench = Bench(device, peak_flops(device), given.repeats, 15 if given.profile else 0)
    rows: list[dict[str, Any]] = []
    result = {"device": device_name(device), "torch": torch.__version__, "rows": rows}
    print(HEADER)
    for name, case in cases(given):
        if time.monotonic() - began > given.budget:
            print(f"the budget of {given.budget} s is spent: {name} {case.peft} is left out")
            continue
        rows.append({"size": name, **dataclasses.asdict(case), **attempt(case, bench)})
        print(line(rows[-1]), flush=True)
        save(given.json, result)  # now, since the run may be cut off
    if given.generate:
        speeds: dict[str, float] = {}
        for quant in given.quant:
            speeds |= generation(given.sizes[0], quant, device, given.dry)
        print(json.dumps(speeds))
        result["generation"] = speeds
        save(given.json, result)


def save(path: str | None, result: dict[str, Any]) -> None:
    if path:
        write_json(path, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["3b"], choices=SIZES)
    parser.add_argument("--methods", nargs="+", default=["bone"], choices=METHODS)
    parser.add_argument(
        "--quant", nargs="+", default=["none"], help="none, nf4, fp8, fp8_compute, .."
    )
    parser.add_argument("--grad_cp", nargs="+", type=int, default=[1], choices=[0, 1, 2])
    parser.add_argument("--graphs", nargs="+", type=int, default=[0], choices=[0, 1],
                        help="as --cuda_graphs of training")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", default=["4x512"], help="batch x length")
    parser.add_argument("--repeats", type=int, default=5, help="steps after two uncounted ones")
    parser.add_argument("--budget", type=float, default=3600, help="seconds to begin rows in")
    parser.add_argument("--profile", action="store_true", help="list the longest kernels of each")
    parser.add_argument("--generate", action="store_true", help="also time writing tokens")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--json", help="also write all figures to this file")
    return parser.parse_args()


def cases(given: argparse.Namespace) -> list[tuple[str, StepCase]]:
    """Every combination of the flags, those with and without graphs side by side."""
    found = []
    flags = given.sizes, given.methods, given.quant, given.grad_cp, given.shapes, given.graphs
    for size, method, quant, grad_cp, shape, graphs in itertools.product(*flags):
        if method == "none" and quant != "none":
            continue  # all is trained, so nothing is quantised
        if graphs and grad_cp != 1:
            continue  # graphs recompute whole blocks
        batch, _, length = shape.partition("x")
        if not (batch.isdigit() and length.isdigit() and int(batch) and int(length)):
            raise UserError(f"--shapes: {shape!r} is not batch x length, as in 4x512")
        generation, *sizes = SIZES[size]
        layers, width = TINY if given.dry else sizes
        shape = layers, width, 512 if given.dry else 65536, int(length), int(batch)
        case = StepCase(*shape, method, "bf16", grad_cp, graphs=graphs, generation=generation)
        found.append((size, replace(case, quant=None if quant == "none" else quant)))
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_flops(device: torch.device) -> float:
    """Operations per second that MFU is a share of."""
    for name, peak in PEAKS.items():
        if name in device_name(device):
            return peak
    side = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16).unbind()
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def attempt(case: StepCase, bench: Bench) -> dict[str, Any]:
    """One row's figures, or why there are none."""
    try:
        return measure(case, bench)
    except (RuntimeError, UserError) as error:  # out of memory is a RuntimeError
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    finally:
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(case: StepCase, bench: Bench) -> dict[str, Any]:
    """One row's figures: a step, beside it the products that no step can leave out."""
    torch.manual_seed(0)
    model = random_model(case, bench.device)
    tokens, labels = torch.randint(
        case.vocab_size, (2, case.micro_bsz, case.ctx_len), device=bench.device
    )
    if case.graphs:
        on_gpu = bench.device.type == "cuda"
        model.graphs = cuda_graphs(bench.device) if on_gpu else GraphedBlocks(run_again)
    step = BareLoop(case, model, tokens, labels)
    for _ in range(2):
        step()  # the second one records
    before, peak = peak_bytes(step, bench.device)
    held = torch.cuda.max_memory_reserved() if bench.device.type == "cuda" else peak
    kernels = launches(step, bench)
    products = LowerBound(case, model)
    products()
    pairs = [
        (seconds(step, bench.device), seconds(products, bench.device)) for _ in range(bench.repeats)
    ]
    step_s, products_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    with FlopCounterMode(display=False) as counter:
        LowerBound(replace(case, grad_cp=0), model)()
    return {
        "step_ms": step_s * 1e3,
        "fastest_ms": min(a for a, _ in pairs) * 1e3,
        "slowest_ms": max(a for a, _ in pairs) * 1e3,
        "tokens_per_s": tokens.numel() / step_s,
        "products_ms": products_s * 1e3,
        "products_share": products_s / step_s,
        "mfu": counter.get_total_flops() / step_s / bench.peak,
        "before_mib": before / MIB,
        "peak_mib": peak / MIB,
        "planned_mib": (before + planned_bytes(case, bench.device)) / MIB,
        "held_mib": held / MIB,
        **kernels,
    }


def run_again(work: Work) -> Work:
    """In place of recording."""
    work()
    return work


def planned_bytes(case: Case, device: torch.device) -> int:
    """What --plan estimates that a step takes on top of weights and optimizer state."""
    config = TrainConfig(load_model="-", micro_bsz=case.micro_bsz, ctx_len=case.ctx_len)
    meta = torch.device("meta")
    plan = ModelPlan(lambda n: random_model(replace(case, n_layer=n), meta), case.n_layer)
    return activations(config, plan, device.type).peak


def launches(step: Callable[[], object], bench: Bench) -> dict[str, Any]:
    """What the host launches in one step, the kernels that run, their time together, and the
    longest; on a CPU, operators.
    """
    gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as found:
        step()
        if gpu:
            torch.cuda.synchronize()
    host = [x.count for x in found.key_averages() if not gpu or "Launch" in x.key]
    wanted = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    # Names that torch gives to parts of a step, such as the optimizer's, stand beside the kernels
    # in them.
    events = [
        x for x in found.key_averages() if x.device_type == wanted and not x.is_user_annotation
    ]
    spent = {x.key: (x.self_device_time_total if gpu else x.self_cpu_time_total) for x in events}
    longest = sorted(events, key=lambda x: -spent[x.key])[: bench.profiled]
    return {
        "launches": sum(host),
        "kernels": sum(x.count for x in events),
        "kernels_ms": sum(spent.values()) / 1e3,
        "longest": [{"name": x.key, "ms": spent[x.key] / 1e3, "count": x.count} for x in longest],
    }


def generation(size: str, quant: str, device: torch.device, dry: bool) -> dict[str, float]:
    """Tokens per second of one sequence, and of 64 at once; with Bone where a base is quantised."""
    number, *sizes = SIZES[size]
    layers, width = TINY if dry else sizes
    case = Case(layers, width, 512, peft="none", precision="bf16", generation=number)
    prefix = "" if quant == "none" else f"{quant}_"
    model = random_model(replace(case, peft="bone", quant=quant) if prefix else case, device)
    n_tokens, n_rows = (4, 4) if dry else (100, 64)
    timed: dict[str, Callable[[], int]] = {
        "one": lambda: len(list(generate(model, [1], n_tokens, 0.0, stop_tokens=()))),
        "batch": lambda: sum(
            map(len, generate_batch(model, [[1] * 8] * n_rows, n_tokens, stop_tokens=()))
        ),
    }
    found = {}
    for name, work in timed.items():
        work()
        began = time.perf_counter()
        found[f"{prefix}{name}_tokens_per_s"] = work() / (time.perf_counter() - began)
    return found


HEADER = (
    "size  method  quant       cp graphs  B x T      step ms   tokens/s  products    MFU  peak MiB"
    "   planned      held  launches   kernels"
)


def line(row: dict[str, Any]) -> str:
    """One row under HEADER, and below it the longest kernels where they were asked for."""
    head = (
        f"{row['size']:5} {row['peft']:7} {row['quant'] or 'none':11} {row['grad_cp']:<3}"
        f"{row['graphs']:<6} {row['micro_bsz']:>2} x {row['ctx_len']:<5} "
    )
    if "error" in row:
        return head + row["error"]
    text = head + (
        f"{row['step_ms']:9.1f} {row['tokens_per_s']:10.0f} {row['products_share']:9.1%} "
        f"{row['mfu']:6.1%} {row['peak_mib']:9.0f} "
        f"{row['planned_mib']:9.0f} {row['held_mib']:9.0f} {row['launches']:9} {row['kernels']:9}"
    )
    for x in row["longest"]:
        text += f"\n    {x['ms']:9.2f} ms {x['count']:6} {x['name'][:90]}"
    return text


if __name__ == "__main__":
    run_cli(main)
