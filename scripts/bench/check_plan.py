"""Hold the memory that --plan estimates against what training steps really take.

    python scripts/bench/check_plan.py                # one process
    python scripts/bench/check_plan.py --devices 2    # ZeRO 1 to 3 among two, each offloaded too

Every row builds a small model, takes three optimizer steps under DeepSpeed, and follows every
tensor's storage from birth to death: the highest sum of their bytes is the CPU's counterpart of
torch.cuda.max_memory_allocated. Resident memory would add the interpreter, its libraries and
whatever the C library keeps for later.
"""

import argparse
import itertools
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from random_models import add_generation, sizes_of

from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.data import Batch
from finchtune.distributed.launch import run_processes
from finchtune.errors import run_cli
from finchtune.memory.estimate import Estimate, StorageCount, estimate
from finchtune.models import meta_model
from finchtune.models.config import ModelSizes
from finchtune.training.engine import Engine
from finchtune.training.precision import choose_precision
from finchtune.training.setup import build_model, model_plan
from finchtune.weights.tensors import write_tensors

SMALL, DEEP, LARGE_VOCABULARY = (4, 256, 4096), (12, 128, 512), (2, 256, 65536)
"""Layers, channels, tokens of the vocabulary."""
METHODS = ("none", "bone", "bat", "lora", "pissa")
STRATEGIES = ("2", "3", "2_offload", "3_offload")
TOLERANCE = 0.10
STEPS = 3
ROWS_PER_PROCESS = 10  # max_tasks_per_child would do the same, but hangs (Python 3.11)


def cases(devices: int) -> Iterator[tuple[tuple[int, int, int], TrainConfig]]:
    """Sizes and configurations to measure."""
    common = {"load_model": "-", "micro_bsz": 2, "ctx_len": 256, "devices": devices}
    if devices > 1:
        for peft, stage, precision, accumulate in itertools.product(
            ("none", "bone"), ("1", *STRATEGIES), ("fp32", "bf16"), (1, 2)
        ):
            yield (
                SMALL,
                TrainConfig(
                    **common,
                    peft=peft,
                    strategy=f"deepspeed_stage_{stage}",
                    precision=precision,
                    accumulate_grad_batches=accumulate,
                ),
            )
        return
    for precision, peft, grad_cp in itertools.product(("fp32", "bf16"), METHODS, (0, 1, 2)):
        yield SMALL, TrainConfig(**common, peft=peft, grad_cp=grad_cp, precision=precision)
    for sizes, peft, grad_cp in itertools.product(
        (DEEP, LARGE_VOCABULARY), ("none", "bone"), (0, 1)
    ):
        yield sizes, TrainConfig(**common, peft=peft, grad_cp=grad_cp, precision="bf16")
    for strategy, peft in itertools.product(STRATEGIES, ("none", "bone")):
        more = {"strategy": f"deepspeed_stage_{strategy}", "precision": "bf16"}
        yield SMALL, TrainConfig(**common, peft=peft, **more)
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
    add_generation(parser)
    given = parser.parse_args()
    devices, generation = given.devices, given.generation
    if distributed.processes_to_start(devices, 1):
        return run_processes(devices, sys.argv)
    distributed.print_rank_zero(
        f"{'model':18}{'method':8}{'precision':>10}{'cp':>4}{'ZeRO':>11}{'rows x T':>12}"
        f"{'measured':>12}{'estimated':>12}{'ratio':>8}   MiB of one process, {devices} in all"
    )
    ratios = []
    todo = [(sizes_of(generation, *sizes), config) for sizes, config in cases(devices)]
    for (sizes, config), (measured, found) in zip(todo, measure_all(todo, devices), strict=True):
        ratios.append(estimated_bytes(found) / measured)
        distributed.print_rank_zero(line(sizes, config, measured, found))
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    distributed.print_rank_zero(
        f"worst of {len(ratios)} rows: {worst:.3f}; allowed 1 +- {TOLERANCE}"
    )
    return int(abs(worst - 1) > TOLERANCE)


def measure_all(
    todo: list[tuple[ModelSizes, TrainConfig]], devices: int
) -> Iterator[tuple[int, Estimate]]:
    """Measure every row, in order."""
    if devices > 1:
        yield from itertools.starmap(measure, todo)
        distributed.shutdown()
        return
    spawn = multiprocessing.get_context("spawn")
    for start in range(0, len(todo), ROWS_PER_PROCESS):
        group = todo[start : start + ROWS_PER_PROCESS]
        with ProcessPoolExecutor(1, spawn) as pool:
            yield from pool.map(measure, *zip(*group, strict=True))


def line(sizes: ModelSizes, config: TrainConfig, measured: int, found: Estimate) -> str:
    """One row of the table."""
    name = f"L{sizes.n_layer} C{sizes.n_embd} V{sizes.vocab_size}"
    shape = f"{config.accumulate_grad_batches}x{config.micro_bsz} x {config.ctx_len}"
    zero = f"{config.stage} offload" if config.offload else str(config.stage)
    return (
        f"{name:18}{config.peft:8}{config.precision:>10}{config.grad_cp:4}{zero:>11}"
        f"{shape:>12}{measured / 2**20:12.1f}{estimated_bytes(found) / 2**20:12.1f}"
        f"{estimated_bytes(found) / measured:8.3f}   {found.moment}"
    )


def estimated_bytes(found: Estimate) -> int:
    """Bytes of one process, on a CPU those of the device and those moved to the host alike."""
    return found.total + found.host


def measure(sizes: ModelSizes, config: TrainConfig) -> tuple[int, Estimate]:
    """(highest bytes of this process's tensors during three steps, what was estimated)."""
    device = torch.device("cpu")
    if not torch.distributed.is_initialized():
        distributed.init_process_group(device)
    dtype = choose_precision(config, device.type)
    found = estimate(config, model_plan(config, sizes, dtype), distributed.world_size())
    shape = (STEPS, config.accumulate_grad_batches, config.micro_bsz, config.ctx_len)
    with tempfile.TemporaryDirectory() as folder, StorageCount() as count:
        config.load_model = str(weight_file(sizes, dtype, Path(folder)))
        engine = Engine(build_model(config, dtype, device), config, device)
        batches = [
            [Batch(t, t) for t in step] for step in torch.randint(1, sizes.vocab_size, shape)
        ]
        count.restart_peak()
        for step in batches:
            engine.step(step, 1e-3)
    engine.close()
    return count.peak, found


def weight_file(sizes: ModelSizes, dtype: torch.dtype, folder: Path) -> Path:
    """A weight file of random numbers in another dtype, so that loading it allocates memory."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    shapes = {name: tensor.shape for name, tensor in meta_model(sizes).state_dict().items()}
    path = folder / "base.pth"
    write_tensors({n: torch.randn(shape, dtype=other) * 0.02 for n, shape in shapes.items()}, path)
    return path


if __name__ == "__main__":
    run_cli(main)
