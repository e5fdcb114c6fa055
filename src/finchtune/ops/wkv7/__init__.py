"""WKV7, the recurrence of RWKV-7: one operator, a reference, and kernels for CPU and GPU."""

from finchtune.ops.wkv7.chunked import wkv7_chunked
from finchtune.ops.wkv7.dispatch import wkv7
from finchtune.ops.wkv7.reference import wkv7_reference

__all__ = ["wkv7", "wkv7_chunked", "wkv7_reference"]
