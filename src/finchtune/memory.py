"""Memory of a training step, found on fake tensors: shapes and lifetimes without bytes or numbers.

The model's own code runs forward and backward, so what is counted is what the layers really keep,
adapters, recomputation and the chunked loss included. Only what DeepSpeed adds is a formula.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finchtune.adapters import attach
from finchtune.config import TrainConfig
from finchtune.model import RWKV6, ModelConfig

REDUCE_BUCKET = 50_000_000  # elements of gradient that ranks exchange at once
LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
PERSISTENT_ELEMENTS = 100_000  # its stage3_param_persistence_threshold


class StorageCount(TorchDispatchMode):
    """Bytes of all tensors made while it is on that are still alive, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.logsumexp.default:
            # Inside it, out of sight from here, the exponentials take what the input does.
            self.peak = max(self.peak, self.live + args[0].numel() * args[0].element_size())
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is let go, unless it is counted already."""
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

    `kept` lives from the forward to the backward; `loss` and `backward` come on top of it at the
    highest points of the two. `by_part` says what the parts of one block keep.
    """

    kept: int
    loss: int
    backward: int
    by_part: dict[str, int]

    @property
    def peak(self) -> int:
        return self.kept + max(self.loss, self.backward)


def meta_model(config: TrainConfig, sizes: ModelConfig, dtype: torch.dtype) -> RWKV6:
    """The model that a run trains, on the meta device: adapters, trained parameters, dtype."""
    with torch.device("meta"):
        model = RWKV6(sizes, config.grad_cp)
    if config.peft == "none":
        return model.to(dtype).requires_grad_(True)
    attach(model, config.peft, init=False, **config.adapter_hyperparameters)
    for name, parameter in model.named_parameters():
        if any(part in name for part in config.train_parts):
            parameter.requires_grad_(True)
    return model.to(dtype)


def activations(
    config: TrainConfig, sizes: ModelConfig, dtype: torch.dtype, device: str = "cpu"
) -> Activations:
    """What a micro batch of config.micro_bsz rows of ctx_len tokens takes.

    Two and three blocks run, and every figure grows from then on by the same amount with each.
    """
    two, three = (
        simulate(config, ModelConfig(**vars(sizes) | {"n_layer": n}), dtype, device) for n in (2, 3)
    )

    def deep(name: str) -> int:
        small, large = getattr(two, name), getattr(three, name)
        return small + (large - small) * (sizes.n_layer - 2)

    return Activations(deep("kept"), deep("loss"), deep("backward"), two.by_part)


def simulate(
    config: TrainConfig, sizes: ModelConfig, dtype: torch.dtype, device: str = "cpu"
) -> Activations:
    """One forward and backward of the whole model on fake tensors of `device`."""
    model = meta_model(config, sizes, dtype)
    with FakeTensorMode(), torch.device(device):
        materialise(model)
        tokens = torch.zeros(config.micro_bsz, config.ctx_len, dtype=torch.int64)
        with StorageCount() as count, dropped_gradients(model):
            for tensor in [*model.parameters(), *model.buffers(), tokens]:
                count.add(tensor)
            static = count.live
            with growth(model.blocks[-1], count) as by_part:
                loss = model.loss(tokens, tokens)
            kept = count.live
            forward = count.restart_peak()
            loss.backward()
    return Activations(kept - static, forward - kept, count.peak - kept, by_part)


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
    """Let go of every gradient as soon as it is there: the formulas below count them."""

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


def estimate(
    config: TrainConfig,
    sizes: ModelConfig,
    dtype: torch.dtype,
    world: int = 1,
    device: str = "cpu",
    made: Activations | None = None,
    stage: int | None = None,
    offload: bool | None = None,
) -> Estimate:
    """Memory of one of `world` devices while `config` trains a model of `sizes` held in `dtype`.

    ZeRO's `stage` and `offload` are those of config.strategy unless given. `made`, what
    `activations` gave, spares finding it again. Tensors only: a process adds its code, on a GPU
    the CUDA context.
    """
    made = made or activations(config, sizes, dtype, device)
    model = meta_model(config, sizes, dtype)
    stage = config.stage if stage is None else stage
    offload = config.offload if offload is None else offload
    accumulates = config.accumulate_grad_batches > 1
    sums_in_fp32 = accumulates and dtype == torch.bfloat16
    state = zero_state(model, dtype, stage, world, offload, device == "cuda", sums_in_fp32)
    standing = {k: state[k] for k in ("weights", "masters", "moments")}
    held = state["gradients"] if accumulates or stage == 3 else 0
    moments = {
        "forward and backward": [
            {"activations": made.kept, "loss": made.loss, "gradients": held},
            {"activations": made.kept + made.backward, "gradients": held,
             "buffers": state["buffers"]},
            {"activations": made.backward, "gradients": state["gradients"],
             "buffers": state["buffers"]},
        ],
        "optimizer step": [{"gradients": state["gradients"], "update": state["update"]}],
    }  # fmt: skip
    gathered = {"gathered weights": state["gathered weights"]}
    found = [
        Estimate(standing | gathered | parts, moment, state["host"])
        for moment, choices in moments.items()
        for parts in choices
    ]
    return max(found, key=lambda one: one.total)


def zero_state(
    model: nn.Module,
    dtype: torch.dtype,
    stage: int,
    world: int,
    offload: bool = False,
    overlap: bool = False,
    sums_in_fp32: bool = False,
) -> dict[str, int]:
    """Bytes per device of what DeepSpeed's ZeRO `stage` 0 to 3 keeps, as its code allocates it.

    Stage 1 shares fp32 masters and Adam's two moments among the ranks, 2 the gradients too, 3 the
    weights too. "update" is what the optimizer step adds, "host" what offloading moves away.
    `overlap`: gradients are exchanged during backward, from two buffers in turn. `sums_in_fp32`:
    as `Engine` accumulates bf16 gradients, for which it takes stage 2 at least.
    """
    stage = max(2, stage) if sums_in_fp32 and stage else stage
    tensors = [*model.parameters(), *model.buffers()]
    whole = sum(t.numel() * t.element_size() for t in tensors)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    small = sum(p.numel() for p in model.parameters() if p.numel() <= PERSISTENT_ELEMENTS)
    width = dtype.itemsize
    share = -(-trained // world)
    sharded = share if stage else trained
    wide = 4 if sums_in_fp32 else width
    state = {
        "weights": whole if stage < 3 else whole // world + width * small,
        "masters": 0 if stage == 0 and width == 4 else 4 * sharded,
        "moments": 8 * sharded,
        "gradients": wide * (share if stage >= 2 else trained),
        "buffers": width * min(trained, REDUCE_BUCKET) * (2 if overlap else 1) if stage else 0,
        "gathered weights": min(whole, width * LIVE_ELEMENTS) if stage == 3 else 0,
        "update": (4 * sharded if wide < 4 else 0) + (wide * sharded if stage in (1, 2) else 0),
        "host": 0,
    }
    if offload:
        state["host"] = state["masters"] + state["moments"] + 4 * sharded
        state |= {"masters": 0, "moments": 0, "update": 0}
        if stage == 3:
            state["host"] += whole // world
            state["weights"] = width * small
    return state
