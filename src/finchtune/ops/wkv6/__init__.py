"""WKV6, the recurrence of RWKV-6: one operator, a reference, and kernels for CPU and GPU."""

from finchtune.ops.wkv6.chunked import wkv6_chunked
from finchtune.ops.wkv6.dispatch import wkv6
from finchtune.ops.wkv6.reference import wkv6_reference

__all__ = ["wkv6", "wkv6_chunked", "wkv6_reference"]
