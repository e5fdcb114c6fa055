"""The compiled kernels: built on first use, registered as torch operators."""

from finchtune.ops.kernels.operators import (
    DTYPES,
    cpu_kernels_set_aside,
    cpu_paths,
    fits_cpu,
    has_kernels,
    use_cpu_path,
)

__all__ = [
    "DTYPES",
    "cpu_kernels_set_aside",
    "cpu_paths",
    "fits_cpu",
    "has_kernels",
    "use_cpu_path",
]
