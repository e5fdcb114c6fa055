"""Hold the memory that --plan foretells against what training steps really take.

    python scripts/check_plan.py                # one process
    python scripts/check_plan.py --devices 2    # ZeRO 1 to 3 among two, with and without offload

Every row builds a small model, takes three optimizer steps under DeepSpeed, and reads the highest
sum of bytes that torch's CPU allocator had handed out at a time: the same for every run, to the
byte, and the CPU's counterpart of torch.cuda.max_memory_allocated. Resident memory would add the
interpreter, its libraries and whatever the C library keeps for later.
"""

import argparse
import itertools
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from finchtune import distributed
from finchtune.checkpoint import write_tensors
from finchtune.config import TrainConfig
from finchtune.data import Batch
from finchtune.engine import Engine, choose_precision
from finchtune.errors import run_cli
from finchtune.launch import run_processes
from finchtune.memory import Estimate, estimate
from finchtune.model import RWKV6, ModelConfig
from finchtune.run import build_model

SMALL = ModelConfig(n_layer=4, n_embd=256, vocab_size=4096)
DEEP = ModelConfig(n_layer=12, n_embd=128, vocab_size=512)
LARGE_VOCABULARY = ModelConfig(n_layer=2, n_embd=256, vocab_size=65536)
METHODS = ("none", "bone", "bat", "lora", "pissa")
TOLERANCE = 0.10
STEPS = 3
MEASUREMENTS = 5
ROWS_PER_PROCESS = 10  # max_tasks_per_child would do the same, but hangs (Python 3.11)


def rows(devices: int) -> Iterator[tuple[ModelConfig, TrainConfig]]:
    """Sizes and configurations to measure."""
    common = {"load_model": "-", "micro_bsz": 2, "ctx_len": 256, "devices": devices}
    if devices > 1:
        for peft, stage, precision in itertools.product(
            ("none", "bone"), ("1", "2", "3", "2_offload", "3_offload"), ("fp32", "bf16")
        ):
            strategy = {"strategy": f"deepspeed_stage_{stage}", "precision": precision}
            yield SMALL, TrainConfig(**common, peft=peft, **strategy)
        return
    for precision, peft, grad_cp in itertools.product(("fp32", "bf16"), METHODS, (0, 1, 2)):
        yield SMALL, TrainConfig(**common, peft=peft, grad_cp=grad_cp, precision=precision)
    for sizes, peft, grad_cp in itertools.product(
        (DEEP, LARGE_VOCABULARY), ("none", "bone"), (0, 1)
    ):
        yield sizes, TrainConfig(**common, peft=peft, grad_cp=grad_cp, precision="bf16")
    for peft in ("none", "bone"):
        more = {"precision": "bf16", "accumulate_grad_batches": 2}
        yield SMALL, TrainConfig(**common, peft=peft, **more)
        yield (
            SMALL,
            TrainConfig(**common | {"ctx_len": 2048, "micro_bsz": 1}, peft=peft, precision="bf16"),
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=1, help="processes [1]")
    devices = parser.parse_args().devices
    if distributed.processes_to_start(devices, 1):
        return run_processes(devices, sys.argv)
    distributed.say(
        f"{'model':18}{'method':8}{'precision':>10}{'cp':>4}{'ZeRO':>11}{'rows x T':>12}"
        f"{'measured':>12}{'foretold':>12}{'ratio':>8}   MiB of one process, {devices} in all"
    )
    ratios = []
    for (sizes, config), (measured, found) in zip(rows(devices), measure_all(devices), strict=True):
        ratios.append(foretold(found) / measured)
        distributed.say(line(sizes, config, measured, found))
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    distributed.say(f"worst of {len(ratios)} rows: {worst:.3f}; allowed 1 +- {TOLERANCE}")
    return int(abs(worst - 1) > TOLERANCE)


def measure_all(devices: int) -> Iterator[tuple[int, Estimate]]:
    """Measure every row, in order."""
    if devices > 1:
        yield from itertools.starmap(measure, rows(devices))
        distributed.shutdown()
        return
    todo = list(rows(devices))
    spawn = multiprocessing.get_context("spawn")
    for start in range(0, len(todo), ROWS_PER_PROCESS):
        group = todo[start : start + ROWS_PER_PROCESS]
        with ProcessPoolExecutor(1, spawn) as pool:
            yield from pool.map(measure, *zip(*group, strict=True))


def line(sizes: ModelConfig, config: TrainConfig, measured: int, found: Estimate) -> str:
    """One row of the table."""
    name = f"L{sizes.n_layer} C{sizes.n_embd} V{sizes.vocab_size}"
    shape = f"{config.accumulate_grad_batches}x{config.micro_bsz} x {config.ctx_len}"
    zero = f"{config.stage} offload" if config.offload else str(config.stage)
    return (
        f"{name:18}{config.peft:8}{config.precision:>10}{config.grad_cp:4}{zero:>11}"
        f"{shape:>12}{measured / 2**20:12.1f}{foretold(found) / 2**20:12.1f}"
        f"{foretold(found) / measured:8.3f}   {found.moment}"
    )


def foretold(found: Estimate) -> int:
    """Bytes of one process, on a CPU those of the device and those moved to the host alike."""
    return found.total + found.host


def measure(sizes: ModelConfig, config: TrainConfig) -> tuple[int, Estimate]:
    """(highest bytes of this process during three steps, what was foretold).

    A session of the profiler now and then loses events: a figure that is far off counts only when
    a second measurement gives the same, or after MEASUREMENTS of them.
    """
    device = torch.device("cpu")
    if not torch.distributed.is_initialized():
        distributed.init_process_group(device)
    dtype = choose_precision(config, device)
    found = estimate(config, sizes, dtype, distributed.world_size())
    seen: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        config.load_model = str(weight_file(sizes, dtype, Path(folder)))
        for _ in range(MEASUREMENTS):
            seen.append(peak_of_steps(sizes, config, dtype, device))
            near = seen[-1] > 0 and abs(foretold(found) / seen[-1] - 1) <= TOLERANCE
            if distributed.all_min(float(near or seen.count(seen[-1]) > 1), device):
                break
    return seen[-1], found


def peak_of_steps(
    sizes: ModelConfig, config: TrainConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """The highest sum of live bytes while three steps run."""
    with allocations() as built:
        model = build_model(config, dtype, device)
        engine = Engine(model, config, device)
    shape = (config.accumulate_grad_batches, config.micro_bsz, config.ctx_len)
    with allocations() as stepped:
        for _ in range(STEPS):
            draws = torch.randint(1, sizes.vocab_size, shape)
            engine.step([Batch(tokens, tokens) for tokens in draws], 1e-3)
    engine.close()
    return sum(built) + max(itertools.accumulate(stepped), default=0)


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes taken (above zero) and given back (below) by torch's CPU allocator, in their order."""
    changes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield changes
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    changes += [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]


def weight_file(sizes: ModelConfig, dtype: torch.dtype, folder: Path) -> Path:
    """A weight file of random numbers in another dtype, so that loading it allocates memory."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in RWKV6(sizes).state_dict().items()}
    path = folder / "base.pth"
    write_tensors({n: torch.randn(shape, dtype=other) * 0.02 for n, shape in shapes.items()}, path)
    return path


if __name__ == "__main__":
    run_cli(main)
