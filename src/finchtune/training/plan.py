"""`--plan`: what a run will take of memory, steps, data and disk, told without running it."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from finchtune.adapters import is_adapter_tensor
from finchtune.config import TrainConfig
from finchtune.data import Data
from finchtune.errors import UserError
from finchtune.memory.estimate import (
    Activations,
    Estimate,
    ModelPlan,
    activations,
    estimate,
    tokens_at_once,
)
from finchtune.models import LanguageModel, ModelSizes, meta_model, released_sizes
from finchtune.ops.kernels import cpu_standing_for, has_kernels, kernels_absent
from finchtune.training.batch_size import rows_per_process, split
from finchtune.training.precision import check_device, choose_precision, device_type
from finchtune.training.schedule import Schedule
from finchtune.training.setup import model_plan, open_data
from finchtune.training.warm_start import start_from_file
from finchtune.weights.base import model_sizes

GRAD_CP = (0, 1, 2)
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
    "optimizer": ("master weights", "moments", "update"),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "loss": ("loss",),
    "buffers": ("buffers", "reduce bucket", "staging", "gathered", "graphs"),
}
MIB, GIB = 1 << 20, 1 << 30


def print_plan(config: TrainConfig) -> None:
    """Print the plan of a run. Reads the sizes of the model and the data, trains nothing.

    `config.load_model` is a weight file, or the name of a released size. The model is set up as
    for training, on the meta device. Raises UserError for all that training would refuse.
    """
    config = planned_batch(config)
    device = device_type(config)
    check_device(config, torch.device(device))
    dtype = choose_precision(config, device)
    sizes = planned_sizes(config.load_model)
    plan = model_plan(config, sizes, dtype)
    if config.peft_load:
        start_from_file(plan.model, config)
    show(model_lines(config, plan.model))
    data = open_data(config, sizes.vocab_size) if config.data_file else None
    if data:
        config = dataclasses.replace(config, ctx_len=data.ctx_len)
    show(data_lines(config, plan.model, data))
    show(memory_lines(config, plan, device))


def show(lines: Iterator[str]) -> None:
    """Print lines, and an empty one."""
    print("\n".join(lines) + "\n", flush=True)


def planned_batch(config: TrainConfig) -> TrainConfig:
    """The configuration with the accumulation that --global_bsz asks for."""
    if not config.micro_bsz:
        raise UserError("`plan` needs a number for `micro_bsz`; auto looks at a device at work")
    if not config.global_bsz:
        return config
    rows = rows_per_process(config, config.readers(config.devices * config.num_nodes))
    return split(config, rows, config.micro_bsz)


def planned_sizes(load_model: str) -> ModelSizes:
    """Sizes of a released model by its name, else those of a weight file, which is only mapped."""
    released = released_sizes()
    if load_model in released:
        return released[load_model]
    if not Path(load_model).exists():
        names = ", ".join(released)
        raise UserError(f"`load_model` {load_model}: no such file; `plan` also takes {names}")
    return model_sizes(load_model)


def model_lines(config: TrainConfig, model: LanguageModel) -> Iterator[str]:
    """Sizes, parameters, and what is written to the disk at a time."""
    sizes, dtype = model.config, model.emb.weight.dtype
    total = sum(p.numel() for p in meta_model(sizes).parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield (
        f"model        L{sizes.n_layer} C{sizes.n_embd} F{sizes.dim_ffn} V{sizes.vocab_size}, "
        f"{sizes.n_head} heads of {sizes.head_size}, {str(dtype).removeprefix('torch.')}"
    )
    adapters = sum(p.numel() for name, p in model.named_parameters() if is_adapter_tensor(name))
    states = sum(p.numel() for p in model.initial_states().values())
    total += adapters + states
    yield f"parameters   {total:,}"
    yield f"trained      {trained:,} ({trained / total:.2%}; {config.trained})"
    if adapters and states:
        yield f"             {adapters:,} of adapters, {states:,} of states"
    weights, checkpoint = file_bytes(config, model)
    yield f"disk         {size(weights)} for each rwkv-N.pth"
    yield f"             {size(checkpoint)} for each resumable checkpoint"


def file_bytes(config: TrainConfig, model: LanguageModel) -> tuple[int, int]:
    """Bytes of a rwkv-N.pth, and of a checkpoint: fp32 weights and moments of what is trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = model.state_dict()  # without the codes of quantised weights, which no file holds
    frozen = sum(b.nbytes for name, b in model.named_buffers() if name in stored)
    width = model.emb.weight.element_size() if config.trains_all else 4
    return width * trained + frozen, 12 * trained + frozen


def data_lines(config: TrainConfig, model: LanguageModel, data: Data | None) -> Iterator[str]:
    """Steps and tokens, documents that are never visited, padding, and the disk that it all takes.

    Without data only what the flags say.
    """
    world = config.readers(config.devices * config.num_nodes)
    rows = config.micro_bsz * config.accumulate_grad_batches * world
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
    weights, checkpoint = file_bytes(config, model)
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
    yield from (f"{name:<13}{text}" for name, text in data.report())
    yield f"padding      at most {found['padding_waste']:.1%} of the positions"


def memory_lines(config: TrainConfig, plan: ModelPlan, device: str) -> Iterator[str]:
    """A table of the memory of one device, and what a block's activations are made of."""
    world = config.devices * config.num_nodes
    sizes, dtype = plan.model.config, plan.model.emb.weight.dtype
    made = {}
    with fake_device(device) as fakes:
        for cp in GRAD_CP:
            recomputing = model_plan(dataclasses.replace(config, grad_cp=cp), sizes, dtype)
            made[cp] = activations(config, recomputing, fakes)
    whose = "GPU" if device == "cuda" else "process"
    yield (
        f"memory of one {whose} of {world} at the highest moment of a step, "
        f"{config.micro_bsz} x {config.ctx_len} tokens, in MiB"
    )
    yield f"{'':15}{'grad_cp':>8}" + "".join(f"{name:>12}" for name in (*COLUMNS, "total"))
    for name, (stage, offload) in STRATEGIES.items():
        for cp, one in made.items():
            chosen = (stage, offload, cp) == (config.stage, config.offload, config.grad_cp)
            graphs = config.cuda_graphs and cp == 1 and stage < 3
            run = dataclasses.replace(config, cuda_graphs=graphs)
            found = estimate(run, plan, world, device, one, stage, offload)
            yield table_line(name, cp, found) + ("  <- this run" if chosen else "")
    yield operators_line(config, plan, device)
    yield ""
    yield from activation_lines(made[GRAD_CP[0]], config.micro_bsz * tokens_at_once(config))


@contextlib.contextmanager
def fake_device(device: str) -> Iterator[str]:
    """Within, the estimate is one for this type of device; gives the type of its fake tensors."""
    if device == "cuda" and not torch.cuda.is_available():
        with cpu_standing_for(device):
            yield "cpu"
    else:
        yield device


def operators_line(config: TrainConfig, plan: ModelPlan, device: str) -> str:
    """Which forms of the operators were counted; of a GPU elsewhere also what the others take."""
    with fake_device(device) as fakes:
        if not has_kernels(device):
            return "counted in plain torch, since there are no compiled kernels here"
        if fakes == device:
            return "counted with the compiled kernels"
        if config.cuda_graphs:
            return "counted with the compiled kernels, without which `cuda_graphs` is refused"
        with kernels_absent():
            plain = activations(config, plan, fakes)
    total = estimate(config, plan, config.devices * config.num_nodes, device, plain).total
    return (
        f"counted with the compiled kernels; this run takes {total / MIB:,.0f} MiB on a GPU "
        "machine without nvcc, in plain torch"
    )


def table_line(name: str, grad_cp: int, found: Estimate) -> str:
    """One row of the table: a column's bytes are the sum of its parts."""
    cells = [sum(found.parts.get(part, 0) for part in parts) for parts in COLUMNS.values()]
    numbers = "".join(f"{value / MIB:12,.0f}" for value in (*cells, found.total))
    host = f"  {found.host / MIB:,.0f} on the host" if found.host else ""
    return f"{name:15}{grad_cp:8}{numbers}  {found.moment}{host}"


def activation_lines(made: Activations, tokens: int) -> Iterator[str]:
    """What one block keeps of a token without recomputation."""
    if made.boundaries:
        yield f"states between chunks, in MiB: {made.boundaries / MIB:,.1f}"
    parts = ", ".join(f"{name} {value / tokens:,.0f}" for name, value in made.by_part.items())
    yield f"a block keeps of each token, in bytes: {parts}"


def size(n_bytes: float) -> str:
    """Bytes in words: MiB, or GiB from one on."""
    return f"{n_bytes / GIB:,.2f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:,.2f} MiB"
