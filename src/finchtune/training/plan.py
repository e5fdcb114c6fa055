"""`--plan`: what a run will take of memory, steps, data and disk, told without running it."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from finchtune.config import TrainConfig
from finchtune.data import Data
from finchtune.errors import UserError
from finchtune.memory.estimate import Activations, Estimate, activations, estimate, meta_model
from finchtune.models.rwkv6 import RWKV6, ModelConfig
from finchtune.ops.kernels import cpu_kernels_set_aside
from finchtune.training.batch_size import rows_per_process, split
from finchtune.training.precision import planned_precision
from finchtune.training.schedule import Schedule
from finchtune.training.setup import open_data
from finchtune.weights.base import model_sizes

GRAD_CP = (0, 1, 2)
RELEASED = {
    "1.6B": ModelConfig(n_layer=24, n_embd=2048, vocab_size=65536),
    "3B": ModelConfig(n_layer=32, n_embd=2560, vocab_size=65536),
    "7B": ModelConfig(n_layer=32, n_embd=4096, vocab_size=65536),
    "14B": ModelConfig(n_layer=61, n_embd=4096, vocab_size=65536),
}
STRATEGIES = {
    "ZeRO 0": (0, False),
    "ZeRO 1": (1, False),
    "ZeRO 2": (2, False),
    "ZeRO 2 offload": (2, True),
    "ZeRO 3": (3, False),
    "ZeRO 3 offload": (3, True),
}
COLUMNS = {
    "weights": ("weights",),
    "optimizer": ("masters", "moments", "update"),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "loss": ("loss",),
    "buffers": ("buffers", "reduce bucket", "staging", "gathered"),
}
MIB, GIB = 1 << 20, 1 << 30


def print_plan(config: TrainConfig) -> None:
    """Print the plan of a run. Reads the sizes of the model and the data, trains nothing.

    `config.load_model` is a weight file, or the name of a released size. Raises UserError for a
    model, data or values that would not train either.
    """
    config = planned_batch(config)
    sizes = planned_sizes(config.load_model)
    dtype, device = planned_precision(config)
    for lines in (
        model_lines(config, sizes, dtype),
        data_lines(config, sizes, dtype),
        memory_lines(config, sizes, dtype, device),
    ):
        print("\n".join(lines) + "\n", flush=True)


def planned_batch(config: TrainConfig) -> TrainConfig:
    """The configuration with the accumulation that --global_bsz asks for."""
    if not config.micro_bsz:
        raise UserError("--plan needs a number for --micro_bsz; auto looks at a device at work")
    if not config.global_bsz:
        return config
    rows = rows_per_process(config, config.devices * config.num_nodes)
    return split(config, rows, config.micro_bsz)


def planned_sizes(load_model: str) -> ModelConfig:
    """Sizes of a released model by its name, else those of a weight file, which is only mapped."""
    if load_model in RELEASED:
        return RELEASED[load_model]
    if not Path(load_model).is_file():
        names = ", ".join(RELEASED)
        raise UserError(f"--load_model {load_model}: no such file; --plan also takes {names}")
    return model_sizes(load_model)


def model_lines(config: TrainConfig, sizes: ModelConfig, dtype: torch.dtype) -> Iterator[str]:
    """Sizes, parameters, and what is written to the disk at a time."""
    model = meta_model(config, sizes, dtype)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield (
        f"model        L{sizes.n_layer} C{sizes.n_embd} F{sizes.dim_ffn} V{sizes.vocab_size}, "
        f"{sizes.n_head} heads of {sizes.head_size}, {str(dtype).removeprefix('torch.')}"
    )
    yield f"parameters   {total:,}"
    yield f"trained      {trained:,} ({trained / total:.2%}; --peft {config.peft})"
    weights, checkpoint = file_bytes(config, model)
    yield f"disk         {size(weights)} for each rwkv-N.pth"
    yield f"             {size(checkpoint)} for each resumable checkpoint"


def file_bytes(config: TrainConfig, model: RWKV6) -> tuple[int, int]:
    """Bytes of a rwkv-N.pth, and of a checkpoint: fp32 weights and moments of what is trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(b.numel() * b.element_size() for b in model.buffers())
    width = model.emb.weight.element_size() if config.peft == "none" else 4
    return width * trained + frozen, 12 * trained + frozen


def data_lines(config: TrainConfig, sizes: ModelConfig, dtype: torch.dtype) -> Iterator[str]:
    """Steps and tokens, documents that are never visited, padding, and the disk that it all takes.

    Without --data_file only what the flags say.
    """
    world = config.devices * config.num_nodes
    rows = config.micro_bsz * config.accumulate_grad_batches * world
    data = open_data(config, sizes.vocab_size) if config.data_file else None
    schedule = Schedule(config, rows, data.n_rows if data else 0)
    total = schedule.total
    yield (
        f"step         {rows:,} rows = {config.micro_bsz} x {config.accumulate_grad_batches} "
        f"accumulated x {world} devices, at most {rows * config.ctx_len:,} tokens"
    )
    if not total:
        yield "steps        give --data_file or --epoch_steps to learn how many"
        return
    yield f"steps        {total:,} = {schedule.epoch_steps:,} x {config.epoch_count} epochs"
    files = math.ceil(config.epoch_count / config.epoch_save)
    checkpoints = math.ceil(total / config.save_every) if config.save_every else 0
    kept = min(checkpoints, config.keep_last or checkpoints)
    weights, checkpoint = file_bytes(config, meta_model(config, sizes, dtype))
    yield (
        f"files        {files:,} rwkv-N.pth, {kept:,} resumable checkpoints: "
        f"{size(files * weights + kept * checkpoint)} in all"
    )
    if data:
        yield from visit_lines(data, total * rows)


def visit_lines(data: Data, drawn: int) -> Iterator[str]:
    """What `drawn` rows read of the data."""
    found = data.describe()
    yield f"data         {found['documents']:,} documents, {found['tokens']:,} tokens"
    yield f"passes       {drawn / data.n_rows:.2f} over {data.n_rows:,} rows"
    if data.dataload == "get":
        unread = max(0, data.n_rows - drawn)
        yield f"never read   {unread:,} windows"
    else:
        visited = len(set(data.document_ids(0, 0, 1, 1, min(drawn, data.n_rows))))
        yield f"never read   {found['documents'] - visited:,} documents"
    yield from (f"{name:<13}{text}" for name, text in data.labels.lines())
    yield f"padding      at most {found['padding_waste']:.1%} of the positions"


def memory_lines(
    config: TrainConfig, sizes: ModelConfig, dtype: torch.dtype, device: str
) -> Iterator[str]:
    """A table of the memory of one device, and what a block's activations are made of."""
    world = config.devices * config.num_nodes
    fakes = "cuda" if torch.cuda.is_available() and device == "cuda" else "cpu"
    with cpu_kernels_set_aside() if device == "cuda" else contextlib.nullcontext():
        made = {
            cp: activations(dataclasses.replace(config, grad_cp=cp), sizes, dtype, fakes)
            for cp in GRAD_CP
        }
    whose = "GPU" if device == "cuda" else "process"
    yield (
        f"memory of one {whose} of {world} at the highest moment of a step, "
        f"{config.micro_bsz} x {config.ctx_len} tokens, in MiB"
    )
    yield f"{'':15}{'grad_cp':>8}" + "".join(f"{name:>12}" for name in (*COLUMNS, "total"))
    for name, (stage, offload) in STRATEGIES.items():
        for cp, one in made.items():
            chosen = (stage, offload, cp) == (config.stage, config.offload, config.grad_cp)
            found = estimate(config, sizes, dtype, world, device, one, stage, offload)
            yield table_line(name, cp, found) + ("  <- this run" if chosen else "")
    yield ""
    yield from activation_lines(made[GRAD_CP[0]], config.micro_bsz * config.ctx_len)


def table_line(name: str, grad_cp: int, found: Estimate) -> str:
    """One row of the table: a column's bytes are the sum of its parts."""
    cells = [sum(found.parts.get(part, 0) for part in parts) for parts in COLUMNS.values()]
    numbers = "".join(f"{value / MIB:12,.0f}" for value in (*cells, found.total))
    host = f"  {found.host / MIB:,.0f} on the host" if found.host else ""
    return f"{name:15}{grad_cp:8}{numbers}  {found.moment}{host}"


def activation_lines(made: Activations, tokens: int) -> Iterator[str]:
    """What one block keeps of a token without recomputation."""
    parts = ", ".join(f"{name} {value / tokens:,.0f}" for name, value in made.by_part.items())
    yield f"a block keeps of each token, in bytes: {parts}"


def size(n_bytes: float) -> str:
    """Bytes in words: MiB, or GiB from one on."""
    return f"{n_bytes / GIB:,.2f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:,.2f} MiB"
