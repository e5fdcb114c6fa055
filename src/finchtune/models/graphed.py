"""Writing on a GPU: a step of one token for each row as a CUDA graph.

The hundreds of kernels of such a step take less time than starting them one by one. Not yet run on
a GPU: `tests/models/test_graphed_gpu.py` holds it against the model itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from finchtune.models.cuda_graph import CudaRecorder

MOST_SIZES = 8  # numbers of rows that have a graph, each with states of its own


def fits(model: Any) -> bool:
    """Whether all of a model lies on one GPU; ZeRO-3 leaves shells."""
    parameters = list(model.parameters())
    device = parameters[0].device
    return device.type == "cuda" and all(p.numel() and p.device == device for p in parameters)


class GraphedModel:
    """`advance` and `logits` of a language model.

    A number of rows that comes twice in a row is recorded and from then on replayed. Prompts, and
    numbers that change from step to step, run as they are.
    """

    def __init__(self, model: Any):
        self.model = model
        self.steps: dict[int, OneTokenStep] = {}
        self.last_size = 0

    def advance(
        self, tokens: Tensor, state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """As `LanguageModel.advance`."""
        size, again = len(tokens), len(tokens) == self.last_size
        full = state is not None and all(len(leaf) == size for leaf in tree_leaves(state))
        if cu_seqlens is not None or tokens.shape[1] > 1 or not full:
            return self.model.advance(tokens, state, cu_seqlens)
        self.last_size = size
        if size not in self.steps:
            if not again or len(self.steps) == MOST_SIZES:
                return self.model.advance(tokens, state)
            self.steps[size] = OneTokenStep(self.model, tokens, state)
        return self.steps[size](tokens, state)

    def logits(self, hidden: Tensor) -> Tensor:
        """As `LanguageModel.logits`."""
        return self.model.logits(hidden)


class OneTokenStep:
    """One graph: it reads tokens and states from its own memory, and writes to its own."""

    def __init__(self, model: Any, tokens: Tensor, state: Any):
        self.tokens, self.state = tokens.clone(), tree_map(torch.clone, state)

        def work() -> None:
            self.hidden, self.after = model.advance(self.tokens, self.state)

        with torch.no_grad():
            self.replay = CudaRecorder(tokens.device)(work)

    def __call__(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.tokens.copy_(tokens)
        for own, given in zip(tree_leaves(self.state), tree_leaves(state), strict=True):
            own.copy_(given)
        self.replay()
        return self.hidden.clone(), tree_map(torch.clone, self.after)
