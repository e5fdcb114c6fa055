"""How the rows of an optimizer step are cut into micro batches."""

import dataclasses
from bisect import bisect_left

import psutil
import torch

from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.errors import UserError
from finchtune.memory.estimate import Estimate, estimate, tokens_at_once
from finchtune.models import LanguageModel
from finchtune.training.setup import model_plan

MARGIN = 0.9  # of the free memory that a plan may fill: allocators leave gaps


def resolve_batch_size(
    config: TrainConfig, model: LanguageModel, device: torch.device, longest: int
) -> TrainConfig:
    """The configuration with micro_bsz and accumulate_grad_batches that make up --global_bsz.

    `--micro_bsz auto` takes the most rows that fit into the free memory by the estimate and, on a
    GPU, by a trial, and divide what a process has to do. `longest`: the most tokens in a row.
    Raises UserError where nothing fits or nothing divides. A collective call; the same on all
    ranks.
    """
    rows = rows_per_process(config, config.readers(distributed.world_size()))
    if config.micro_bsz:
        return split(config, rows, config.micro_bsz) if config.global_bsz else config
    free = distributed.all_min(MARGIN * free_memory(config, device), device)
    measured = dataclasses.replace(config, ctx_len=longest)
    choices = [split(measured, rows, n) for n in divisors(rows, config.dataload)]
    # A larger micro batch never takes less, so halving the choices finds the largest that fits.
    first = bisect_left(choices, True, key=lambda one: need_of(one, model, device) <= free)
    for chosen in choices[first:]:
        fits = device.type == "cpu" or trial(chosen, model, estimate_of(chosen, model, device))
        if distributed.all_sum([fits], device)[0] == distributed.world_size():
            distributed.print_rank_zero(
                f"micro batch: {chosen.micro_bsz} x {chosen.accumulate_grad_batches} accumulated"
            )
            return split(config, rows, chosen.micro_bsz)
    least = need_of(choices[-1], model, device)
    raise UserError(
        f"not even one row fits: it takes {least / 2**20:,.0f} MiB beside the weights, and of the "
        f"free memory {free / 2**20:,.0f} MiB may be used; lower `ctx_len`, use `grad_cp` 1, or "
        "a higher deepspeed_stage_N with more `devices`"
    )


def need_of(config: TrainConfig, model: LanguageModel, device: torch.device) -> int:
    """Bytes that a step takes beside the weights, which are in memory already."""
    need = estimate_of(config, model, device)
    return need.total - need.parts["weights"]


def rows_per_process(config: TrainConfig, world: int) -> int:
    """Rows that one of `world` processes has in an optimizer step under --global_bsz."""
    if config.global_bsz % world:
        raise UserError(
            f"`global_bsz` {config.global_bsz} cannot be shared among {world} processes; "
            f"choose a multiple of {world}"
        )
    return config.global_bsz // world


def split(config: TrainConfig, rows: int, micro_bsz: int) -> TrainConfig:
    """The configuration in which a process reads its `rows` by `micro_bsz` at a time."""
    if rows % micro_bsz:
        raise UserError(
            f"`global_bsz` leaves {rows} rows for a process, which `micro_bsz` {micro_bsz} does "
            f"not divide; choose one of {', '.join(map(str, divisors(rows, config.dataload)))}"
        )
    return dataclasses.replace(
        config, micro_bsz=micro_bsz, accumulate_grad_batches=rows // micro_bsz
    )


def divisors(rows: int, dataload: str) -> list[int]:
    """Possible micro batches, the largest first; `only` takes one row at a time."""
    if dataload == "only":
        return [1]
    return [n for n in range(rows, 0, -1) if rows % n == 0]


def estimate_of(config: TrainConfig, model: LanguageModel, device: torch.device) -> Estimate:
    """The memory of this process in a step."""
    plan = model_plan(config, model.config, model.emb.weight.dtype)
    return estimate(config, plan, distributed.world_size(), device.type)


def free_memory(config: TrainConfig, device: torch.device) -> int:
    """Bytes that this process may still take: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    processes = max(1, distributed.world_size() // config.num_nodes)
    return psutil.virtual_memory().available // processes


def trial(config: TrainConfig, model: LanguageModel, need: Estimate) -> bool:
    """Whether a forward and backward goes through beside what DeepSpeed will hold."""
    device = next(model.parameters()).device
    state = ("master weights", "moments", "buffers")
    held = sum(need.parts.get(part, 0) for part in state)
    shape = (config.micro_bsz, tokens_at_once(config))
    try:
        placeholder = torch.empty(held, dtype=torch.uint8, device=device)
        tokens = torch.randint(model.config.vocab_size, shape, device=device)
        model.loss(tokens, tokens)[0].backward()
        del placeholder
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True
