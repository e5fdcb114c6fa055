"""Work on a GPU recorded once, as a CUDA graph, and run again with a single launch."""

import weakref
from collections.abc import Callable

import torch

Work = Callable[[], object]
Record = Callable[[Work], Work]
"""Runs work as it is, records it, and returns what runs it again on the same memory.

What the work reads and writes must stay where it is. What it leaves in memory of its own may be
overwritten as soon as other work of the same recorder runs.
"""


class CudaRecorder:
    """Records a GPU's work, on one stream and into one pool of memory that all its graphs share.

    One that is replayed finds nothing there that it has not written itself: so the order of
    replays is free, as long as what a graph made is copied before the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, work: Work) -> Work:
        with torch.cuda.device(self.device):  # not the current one where a user named another
            return self.record(work)

    def record(self, work: Work) -> Work:
        """As called, with this recorder's device the current one."""
        # Libraries choose their kernels and memory in a first call, which no graph may record.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)
        if not self.graphs:  # torch takes no graph into a pool whose graphs are all gone
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may work meanwhile: one reads rows ahead.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            work()
        self.graphs.add(graph)
        return graph.replay
