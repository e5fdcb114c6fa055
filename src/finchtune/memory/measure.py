"""Seconds and bytes of a piece of work, on a CPU or a GPU."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from finchtune.errors import UserError

MIB = 2**20


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, until the device has done all it was given."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(memory in use before `work`, the highest during it): allocated on a GPU, else resident.

    Raises UserError where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return before, torch.cuda.max_memory_allocated()
    try:
        # Memory that was freed before but not given back would hide the peak.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError, TypeError) as error:
        raise UserError("peak memory on a CPU can be measured on Linux only") from error
    before = process_memory("VmRSS")
    work()
    return before, process_memory("VmHWM")


def free_bytes(device: torch.device) -> int:
    """What may still be allocated on a GPU, or of the machine's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def process_memory(field: str) -> int:
    """Bytes of this process that /proc/self/status gives under `field`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {field}")
