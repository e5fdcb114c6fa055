"""The processes of a run: who each one is, how they start, talk and end.

The public names are imported when first used: who a process is can be told without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finchtune.distributed.collectives import (
        all_gather,
        all_min,
        all_sum,
        barrier,
        broadcast,
        exhaust,
        run_on_rank_zero,
        stream_to_rank_zero,
        sum_in_place,
    )
    from finchtune.distributed.identity import (
        launched,
        local_rank,
        machine,
        print_rank_zero,
        processes_to_start,
        rank,
        world_size,
    )
    from finchtune.distributed.launch import run_processes
    from finchtune.distributed.lifetime import (
        free_port,
        init_process_group,
        pick_device,
        report_once,
        set_parent_death_signal,
        shutdown,
        watch_runner,
    )

_HOMES = {
    "all_gather": "collectives",
    "all_min": "collectives",
    "all_sum": "collectives",
    "barrier": "collectives",
    "broadcast": "collectives",
    "exhaust": "collectives",
    "run_on_rank_zero": "collectives",
    "stream_to_rank_zero": "collectives",
    "sum_in_place": "collectives",
    "launched": "identity",
    "local_rank": "identity",
    "machine": "identity",
    "print_rank_zero": "identity",
    "processes_to_start": "identity",
    "rank": "identity",
    "world_size": "identity",
    "free_port": "lifetime",
    "init_process_group": "lifetime",
    "pick_device": "lifetime",
    "report_once": "lifetime",
    "set_parent_death_signal": "lifetime",
    "run_processes": "launch",
    "shutdown": "lifetime",
    "watch_runner": "lifetime",
}
__all__ = [
    "all_gather",
    "all_min",
    "all_sum",
    "barrier",
    "broadcast",
    "exhaust",
    "free_port",
    "init_process_group",
    "launched",
    "local_rank",
    "machine",
    "pick_device",
    "print_rank_zero",
    "processes_to_start",
    "rank",
    "report_once",
    "run_on_rank_zero",
    "run_processes",
    "set_parent_death_signal",
    "shutdown",
    "stream_to_rank_zero",
    "sum_in_place",
    "watch_runner",
    "world_size",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finchtune.distributed' has no attribute {name!r}")
    return getattr(import_module(f"finchtune.distributed.{_HOMES[name]}"), name)
