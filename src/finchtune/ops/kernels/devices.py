"""For what device code runs: the one that a tensor is on, or that it stands for."""

import contextlib
from collections.abc import Iterator

from torch import Tensor

_set_aside: list[None] = []  # one for each time that the kernels are
_absent: list[None] = []  # one for each time that there are none
_stand_ins: list[str] = []  # for what CPU tensors stand, the last one for now


@contextlib.contextmanager
def kernels_set_aside() -> Iterator[None]:
    """Within, `fits` is never true: the code runs as on a device without these kernels."""
    _set_aside.append(None)
    try:
        yield
    finally:
        _set_aside.pop()


def are_set_aside() -> bool:
    """Whether the code runs within `kernels_set_aside`."""
    return bool(_set_aside)


@contextlib.contextmanager
def kernels_absent() -> Iterator[None]:
    """Within, `has_kernels` is never true: all code runs as where none could be compiled."""
    _absent.append(None)
    try:
        yield
    finally:
        _absent.pop()


def are_absent() -> bool:
    """Whether the code runs within `kernels_absent`."""
    return bool(_absent)


@contextlib.contextmanager
def cpu_standing_for(device: str) -> Iterator[None]:
    """Within, CPU tensors take the ways of another type of device, which counts as having kernels.

    For fake tensors on a machine without such a device: torch has no autograd for theirs there.
    """
    _stand_ins.append(device)
    try:
        yield
    finally:
        _stand_ins.pop()


def stands_for() -> str | None:
    """The type of device that CPU tensors stand for, None where they are themselves."""
    return _stand_ins[-1] if _stand_ins else None


def device_type(x: Tensor) -> str:
    """The type of the device that x is on, or stands for."""
    own = x.device.type
    return _stand_ins[-1] if _stand_ins and own == "cpu" else own
