"""The compiled kernels: built on first use, registered as torch operators."""

from finchtune.ops.kernels.devices import (
    cpu_standing_for,
    device_type,
    kernels_absent,
    kernels_set_aside,
)
from finchtune.ops.kernels.operators import (
    DTYPES,
    cpu_paths,
    fits,
    fits_cpu,
    has_kernels,
    use_cpu_path,
)

__all__ = [
    "DTYPES",
    "cpu_paths",
    "cpu_standing_for",
    "device_type",
    "fits",
    "fits_cpu",
    "has_kernels",
    "kernels_absent",
    "kernels_set_aside",
    "use_cpu_path",
]
