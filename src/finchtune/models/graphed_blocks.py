"""Training on a GPU: a block's forward is one CUDA graph, its recomputation and backward another.

Every block has weights of its own, hence graphs of its own. Between graphs nothing stays in their
memory: inputs are copied in and results out, so that blocks may run in any order, several times
before a backward, and share all buffers. Gradients of parameters are handed to autograd in fresh
tensors, which it accumulates and tells its hooks of, DeepSpeed's among them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from finchtune.errors import UserError
from finchtune.models.cuda_graph import CudaRecorder, Record
from finchtune.models.graph_buffers import Buffers
from finchtune.models.recompute import recomputed
from finchtune.ops.kernels import has_kernels

MOST_SHAPES = 8  # of inputs that a block has graphs for
Signature = tuple[tuple[torch.Size, torch.dtype, bool] | None, ...]
"""Of each input its shape, dtype, and whether it needs a gradient."""
Rows = Sequence[Tensor | None]


class GraphedBlocks:
    """Runs blocks as `recomputed` in mode 1 does, by graphs where inputs have shapes seen before.

    Without graphs: whatever no backward may follow, a block's first call with a shape, packed
    sequences, given states, autocast, and shapes beyond MOST_SHAPES.
    """

    def __init__(self, record: Record):
        self.record, self.buffers = record, Buffers(self.drop)
        self.graphs: dict[nn.Module, dict[Signature, BlockGraphs | None]] = defaultdict(dict)
        self.seen: set[tuple[nn.Module, Signature]] = set()

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        """block(*rows, state, cu_seqlens) -> (*rows, new state). Raises UserError if recording
        fails.
        """
        *rows, state, cu_seqlens = inputs
        if state is None and cu_seqlens is None and is_trained(block, rows[0]):
            graphs = self.graphs_of(block, rows)
            if graphs is not None:
                return graphs(rows)
        return recomputed(1, block, *inputs)

    def graphs_of(self, block: nn.Module, rows: Rows) -> "BlockGraphs | None":
        """A block's graphs for such inputs, recorded now if this is the time for it."""
        signature = tuple(None if x is None else (x.shape, x.dtype, x.requires_grad) for x in rows)
        again = (block, signature) in self.seen
        self.seen.add((block, signature))
        known = self.graphs[block]
        found = known.get(signature)
        if found is not None and found.places == places(found.tensors):
            return found
        may = signature in known or (again and len(known) < MOST_SHAPES)
        if not may or not any(x.requires_grad for x in (*filter_none(rows), *block.parameters())):
            return None
        try:
            found = BlockGraphs(block, rows, self.record, self.buffers)
        except RuntimeError as error:
            raise UserError(
                f"`cuda_graphs`: a block could not be recorded ({str(error).splitlines()[0]}); "
                "train without"
            ) from error
        known[signature] = found
        return found

    def drop(self, buffer: Tensor) -> None:
        """Free the graphs that use a buffer; they are recorded anew when their shapes come again.

        Those that still await their backward keep the buffers that they were recorded with.
        """
        for known in self.graphs.values():
            for signature, graphs in known.items():
                if graphs is not None and buffer.data_ptr() in places(graphs.of_buffers):
                    known[signature] = None


def check_graphs_device(device: torch.device) -> None:
    """Raise UserError for a device without CUDA graphs, or without compiled kernels: plain torch,
    which runs instead of them, copies from the host.
    """
    if device.type != "cuda":
        raise UserError("`cuda_graphs` needs a GPU; drop it on a CPU")
    if not has_kernels("cuda"):
        raise UserError("`cuda_graphs` needs the compiled GPU kernels; train without it")


def cuda_graphs(device: torch.device) -> GraphedBlocks:
    """Blocks by CUDA graphs, for a device that `check_graphs_device` accepts."""
    return GraphedBlocks(CudaRecorder(device))


def is_trained(block: nn.Module, x: Tensor) -> bool:
    """Whether a backward may follow, and no autocast changes the dtypes."""
    device = x.device.type
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return block.training and torch.is_grad_enabled() and not mixed


def filter_none(rows: Rows) -> list[Tensor]:
    return [x for x in rows if x is not None]


def places(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses, which graphs have built in."""
    return [x.data_ptr() for x in tensors]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fresh tensors of the same content; on a GPU by one launch for all of a dtype."""
    fresh = [torch.empty_like(x) for x in tensors]
    if fresh:
        torch._foreach_copy_(fresh, list(tensors))
    return fresh


class BlockGraphs:
    """The two graphs of one block for inputs of one signature."""

    def __init__(self, block: nn.Module, rows: Rows, record: Record, buffers: Buffers):
        self.block, self.buffers = block, buffers
        self.tensors = [*block.parameters(), *block.buffers()]
        self.places = places(self.tensors)
        self.trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
        self.needed = [x is not None and x.requires_grad for x in rows]
        self.inputs = [
            None if x is None else buffers.filled(f"input {i}", x.detach())
            for i, x in enumerate(rows)
        ]
        device = filter_none(rows)[0].device
        self.generator = (
            torch.cuda.default_generators[device.index]
            if device.type == "cuda"
            else torch.default_generator
        )
        with self.random_numbers(self.generator.get_state()):
            self.replay_forward = record(self.forward_work)
            self.replay_backward = record(self.backward_work)
        # Without the others: no gradient must be waited for that never comes.
        self.reached = [name for name in self.trained if f"gradient {name}" in self.gradients]

    @contextmanager
    def random_numbers(self, state: Tensor) -> Iterator[None]:
        """Within, random numbers are those after `state`; then as if none had been drawn."""
        now = self.generator.get_state()
        self.generator.set_state(state)
        try:
            yield
        finally:
            self.generator.set_state(now)

    def forward_work(self) -> None:
        """What is recorded of the forward: from the input buffers to `outputs`, by index."""
        with torch.no_grad():
            results = self.block(*self.inputs, None, None)
        leaves, self.structure = tree_flatten(results)
        self.n_rows = len(results) - 1
        # An input that is handed on need not be copied.
        self.handed_on = {
            i: j for i, y in enumerate(leaves) for j, x in enumerate(self.inputs) if y is x
        }
        self.outputs = {
            i: self.buffers.filled(f"output {i}", y)
            for i, y in enumerate(leaves)
            if i not in self.handed_on
        }

    def backward_work(self) -> None:
        """What is recorded of the backward: from the buffers of inputs and of the gradients of the
        output rows to `gradients`, by use.
        """

        self.of_outputs: dict[int, Tensor] = {}

        def gradient_of(i: int, y: Tensor) -> Tensor | None:
            if i < self.n_rows:
                self.of_outputs[i] = self.buffers.like(f"of output {i}", y)
            return self.of_outputs.get(i)

        found = self.differentiate(self.inputs, gradient_of)
        self.gradients = {
            name: self.buffers.filled(name, d) for name, d in found.items() if d is not None
        }

    def differentiate(
        self, rows: Rows, gradient_of: Callable[[int, Tensor], Tensor | None]
    ) -> dict[str, Tensor | None]:
        """The block computed again, and its gradients, by use: "gradient 0" of rows[0], "gradient
        NAME" of a parameter. `gradient_of` gives that of an output, None if it has none.
        """
        # Leaves of their own: autograd would run those of the parameters on the stream where
        # DeepSpeed made them, which must not be drawn into a graph.
        leaves = [
            None if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip(rows, self.needed, strict=True)
        ]
        trained = {name: p.detach().requires_grad_() for name, p in self.trained.items()}
        with torch.enable_grad():
            outputs = tree_leaves(functional_call(self.block, trained, (*leaves, None, None)))
        self.differentiable = [i for i, y in enumerate(outputs) if y.requires_grad]
        given = {
            i: d
            for i in self.differentiable
            if i not in self.handed_on and (d := gradient_of(i, outputs[i])) is not None
        }
        wanted = {str(i): x for i, x in enumerate(leaves) if x is not None and x.requires_grad}
        wanted |= trained
        found = torch.autograd.grad(
            [outputs[i] for i in given],
            list(wanted.values()),
            list(given.values()),
            allow_unused=True,
        )
        return {f"gradient {name}": d for name, d in zip(wanted, found, strict=True)}

    @property
    def of_buffers(self) -> list[Tensor]:
        """The beginnings of the buffers in use."""
        groups = self.outputs, self.of_outputs, self.gradients
        return [*filter_none(self.inputs), *(x for group in groups for x in group.values())]

    def __call__(self, rows: Rows) -> Any:
        """What block(*rows, None, None) returns."""
        made = Replayed.apply(self, *rows, *(self.trained[name] for name in self.reached))
        results: dict[int, Any] = dict(zip(self.outputs, made, strict=True))
        results |= {i: rows[j] for i, j in self.handed_on.items()}
        return tree_unflatten([results[i] for i in range(len(results))], self.structure)

    def copy_in(self, rows: Rows) -> None:
        for buffer, x in zip(self.inputs, rows, strict=True):
            if buffer is not None and x is not None:
                buffer.copy_(x)

    def forward(self, rows: Rows) -> list[Tensor]:
        """The outputs that are not handed on."""
        self.copy_in(rows)
        self.replay_forward()
        return copies(list(self.outputs.values()))

    def backward(self, rows: Rows, of_outputs: dict[int, Tensor | None]) -> list[Tensor | None]:
        """Gradients of rows and of the parameters that are reached."""
        if any(d is not None for i, d in of_outputs.items() if i >= self.n_rows):
            # No graph is recorded for gradients of new states, which training does not have.
            found = self.differentiate(rows, lambda i, _: of_outputs[i])
        else:
            self.copy_in(rows)
            for i, buffer in self.of_outputs.items():
                d = of_outputs[i]
                buffer.zero_() if d is None else buffer.copy_(d)
            self.replay_backward()
            fresh = copies(list(self.gradients.values()))
            found = dict(zip(self.gradients, fresh, strict=True))
        uses = [f"gradient {use}" for use in (*range(len(rows)), *self.reached)]
        assert all(d is None for use, d in found.items() if use not in uses)
        return [found.get(use) for use in uses]


class Replayed(torch.autograd.Function):
    """A block by its graphs: saves its inputs, as recomputation does."""

    @staticmethod
    def forward(ctx: Any, graphs: BlockGraphs, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The rows, then the parameters that are reached -> the outputs that are not handed on."""
        rows = tensors[: len(graphs.inputs)]
        ctx.save_for_backward(*rows)
        ctx.graphs, ctx.random = graphs, graphs.generator.get_state()
        ctx.set_materialize_grads(False)
        outputs = graphs.forward(rows)
        numbered = zip(graphs.outputs, outputs, strict=True)
        ctx.mark_non_differentiable(*(y for i, y in numbered if i not in graphs.differentiable))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        graphs: BlockGraphs = ctx.graphs
        with graphs.random_numbers(ctx.random):
            of_outputs = dict(zip(graphs.outputs, gradients, strict=True))
            return None, *graphs.backward(ctx.saved_tensors, of_outputs)
