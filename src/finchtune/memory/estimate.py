"""Memory of a training step, found on fake tensors: shapes and lifetimes without bytes or numbers.

The model's own code runs forward and backward, so what is counted is what the layers really keep,
adapters, recomputation and the chunked loss included. Only what DeepSpeed adds is a formula.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finchtune.config import TrainConfig
from finchtune.memory.zero import Zero
from finchtune.models import LanguageModel


class StorageCount(TorchDispatchMode):
    """Bytes of all tensors made while it is on that are still alive, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.logsumexp.default:
            # Inside it, out of sight from here, the exponentials take what the input does.
            self.peak = max(self.peak, self.live + args[0].numel() * args[0].element_size())
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def restart_peak(self) -> int:
        """The peak so far; a new one begins."""
        peak, self.peak = self.peak, self.live
        return peak


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro batch takes beside weights and gradients.

    `saved` lives from the forward to the backward; `forward`, `loss` and `backward` come on top of
    it at the highest points of the blocks' forward, of the loss and of the backward. `by_part`
    says what the parts of one block keep. `boundaries` of what is saved are states between chunks.
    """

    saved: int
    forward: int
    loss: int
    backward: int
    by_part: dict[str, int]
    boundaries: int = 0

    @property
    def peak(self) -> int:
        return self.saved + max(self.forward, self.loss, self.backward)


@dataclass(frozen=True)
class ModelPlan:
    """A model to estimate: `make(n_layer)` gives it with so many blocks, on the meta device.

    Its dtype, adapters, trained parameters and recomputation are those of the run.
    """

    make: Callable[[int], LanguageModel]
    n_layer: int

    @cached_property
    def model(self) -> LanguageModel:
        """The whole model, on the meta device."""
        return self.make(self.n_layer)


def activations(config: TrainConfig, plan: ModelPlan, device: str = "cpu") -> Activations:
    """What a micro batch of config.micro_bsz rows of ctx_len tokens takes.

    Two and three blocks run, and every figure grows from then on by the same amount with each.
    """
    two, three = (simulate(config, plan.make(n), device) for n in (2, 3))

    def deep(name: str) -> int:
        small, large = getattr(two, name), getattr(three, name)
        return small + (large - small) * (plan.n_layer - 2)

    return Activations(
        *(deep("saved"), deep("forward"), deep("loss"), deep("backward")),
        by_part=two.by_part,
        boundaries=deep("boundaries"),
    )


def simulate(config: TrainConfig, model: LanguageModel, device: str = "cpu") -> Activations:
    """One forward and backward of a meta model, which is filled with fake tensors of `device`."""
    with FakeTensorMode(), torch.device(device):
        materialise(model)
        tokens = torch.zeros(config.micro_bsz, tokens_at_once(config), dtype=torch.int64)
        with StorageCount() as count, dropped_gradients(model):
            for tensor in [*model.parameters(), *model.buffers(), tokens]:
                count.add(tensor)
            static = count.live
            blocks: list[int] = []
            model.head.register_forward_pre_hook(lambda *_: blocks.append(count.restart_peak()))
            with growth(model.blocks[-1], count) as by_part:
                loss, state = model.loss(tokens, tokens)
                boundary = sum(leaf.nbytes for leaf in tree_leaves(state))
                del state
            saved = count.live
            forward, head = blocks[0] - saved, count.restart_peak() - saved
            loss.backward()
    boundaries = boundary * boundary_states(config)
    return Activations(
        saved - static + boundaries, forward, head, count.peak - saved, by_part, boundaries
    )


def tokens_at_once(config: TrainConfig) -> int:
    """Tokens of a row that one process has the activations of."""
    length = min(config.ctx_len, config.chunk_ctx) if config.chunked else config.ctx_len
    return -(-length // config.context_parallel)


def boundary_states(config: TrainConfig) -> int:
    """States between chunks that lie on the device amid a step; with their gradients two more."""
    if not config.chunked or config.ctx_len <= config.chunk_ctx:
        return 0
    between = -(-config.ctx_len // config.chunk_ctx) - 1
    exact_on_device = config.bptt == "exact" and not config.infctx_offload
    return (between if exact_on_device else 0) + 2


def materialise(model: nn.Module) -> None:
    """Replace a meta model's tensors by uninitialised ones of the current device and mode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def dropped_gradients(model: nn.Module) -> Iterator[None]:
    """Free every gradient as soon as it is there: the formulas below count them."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)
    yield


@contextmanager
def growth(block: nn.Module, count: StorageCount) -> Iterator[dict[str, int]]:
    """By how many bytes each of a block's children grows the count: what it keeps."""
    grown: dict[str, int] = {}

    def before(module: nn.Module, _: Any) -> None:
        grown[names[module]] = -count.live

    def after(module: nn.Module, _: Any, __: Any) -> None:
        grown[names[module]] += count.live

    names = {child: name for name, child in block.named_children()}
    handles = [child.register_forward_pre_hook(before) for child in names]
    handles += [child.register_forward_hook(after) for child in names]
    yield grown
    for handle in handles:
        handle.remove()


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device at the highest moment of a step, by part, and what must lie on the host.

    `moment` says when that is: "forward and backward" or "optimizer step".
    """

    parts: dict[str, int]
    moment: str
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


ROW_BUFFERS = 8  # at most: a block's inputs, outputs, and the gradients of both


def graph_bytes(config: TrainConfig, model: LanguageModel, made: Activations) -> int:
    """At most what the graphs of --cuda_graphs hold, whose shapes share the memory of the largest:
    that of one block's backward, and buffers of its inputs, results and gradients.
    """
    B, C, width = config.micro_bsz, model.config.n_embd, model.emb.weight.element_size()
    rows = ROW_BUFFERS * B * tokens_at_once(config) * C * width
    state = B * C * (4 * model.config.head_size + 2 * width)
    trained = {
        name: p.nbytes
        for block in model.blocks
        for name, p in block.named_parameters()
        if p.requires_grad
    }
    return made.backward + rows + state + sum(trained.values())


def estimate(
    config: TrainConfig,
    plan: ModelPlan,
    world: int = 1,
    device: str = "cpu",
    made: Activations | None = None,
    stage: int | None = None,
    offload: bool | None = None,
) -> Estimate:
    """Memory of one of `world` devices while `config` trains the model of `plan`.

    ZeRO's `stage` and `offload` are those of config.strategy unless given. `made`, what
    `activations` gave, spares finding it again. Tensors only: a process adds its code, on a GPU
    the CUDA context.
    """
    made = made or activations(config, plan, device)
    state = Zero(
        plan.model,
        plan.model.emb.weight.dtype,
        config.stage if stage is None else stage,
        world,
        config.offload if offload is None else offload,
        on_gpu=device == "cuda",
        accumulates=config.accumulates,
    ).state()
    graphs = graph_bytes(config, plan.model, made) if config.cuda_graphs else 0
    backward = 0 if graphs else made.backward  # which lies in what graphs hold
    standing = state.standing | {"graphs": graphs}
    step, update = "forward and backward", "optimizer step"
    moments = [
        (step, {"activations": made.saved + made.forward}, state.forward),
        (step, {"activations": made.saved, "loss": made.loss}, state.loss),
        (step, {"activations": made.saved + backward}, state.backward),
        (step, {"activations": backward}, state.backward_end),
        (
            step,
            {"activations": made.saved + backward if state.exchanges_early else 0},
            state.exchange,
        ),
        (update, {}, state.norm),
        (update, {}, state.update),
    ]
    found = [
        Estimate(standing | {k: v for k, v in (ours | zeros).items() if v}, name, state.host)
        for name, ours, zeros in moments
    ]
    return max(found, key=lambda one: one.total)
