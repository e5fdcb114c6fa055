"""Base models: reading their tensors, and the model that they make."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from finchtune import distributed
from finchtune.errors import CheckpointError, UserError
from finchtune.models import (
    INITIAL_STATE,
    LanguageModel,
    ModelSizes,
    meta_model,
    sizes_of,
    standard_form,
)
from finchtune.weights.forms import form_of
from finchtune.weights.lazy import LazyTensors, layout_of
from finchtune.weights.pth import write_pth
from finchtune.weights.tensors import check_finite, check_shapes, read_tensors, unwrapped

T = TypeVar("T")


def read_base(path: str | Path) -> Mapping[str, Tensor]:
    """A base model's tensors, from a file or folder of any form, named and shaped as released.

    Prefixes that wrappers put before every name are taken off. Raises UserError for what is no
    model of any generation, or is damaged.
    """
    form = form_of(path)
    assert form.read is not None
    weights = form.read(Path(path))
    if isinstance(weights, LazyTensors):
        return weights  # made in the shapes that they should have
    return _told_of(path, standard_form, unwrapped(weights))


def read_checked(path: str | Path) -> LazyTensors:
    """`read_base` for what is not to be loaded, but held to the same: a whole model, every tensor.

    Raises UserError listing missing, extra and misshapen tensors, and, when it is asked for, for a
    tensor that holds NaN or infinity.
    """
    weights = read_base(path)
    fitting_model(weights, path)

    def checked(name: str) -> Tensor:
        tensor = weights[name]
        check_finite({name: tensor}, path)
        return tensor

    return LazyTensors(layout_of(weights), checked)


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    grad_checkpoint: int = 0,
    shared: bool = False,
) -> LanguageModel:
    """A model of the weight file's generation; every size is read off the tensors.

    `dtype` defaults to the file's own, `device` to the CPU. With `shared` all processes of the run
    load the same file, a collective call, and those of a machine hold one copy of it on the host.
    Raises UserError listing every missing, extra or misshapen tensor, and naming one that holds
    NaN or infinity.
    """
    weights = read_base(path)
    model = fitting_model(weights, path, grad_checkpoint)
    dtype = dtype or layout_of(weights)["emb.weight"].dtype
    if shared:
        weights = converted_once(weights, dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    model.to(device=device, dtype=dtype)
    check_finite(model.state_dict(), path)
    return model


def fitting_model(
    weights: Mapping[str, Tensor], path: str | Path, grad_checkpoint: int = 0
) -> LanguageModel:
    """The model, on the meta device, that these weights are of.

    Raises UserError listing every missing, extra or misshapen tensor.
    """
    layout = layout_of(weights)
    model = meta_model(_told_of(path, sizes_of, layout), grad_checkpoint)
    if any(name.endswith(INITIAL_STATE) for name in layout):
        model.add_initial_state()
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    check_shapes({name: tuple(t.shape) for name, t in layout.items()}, expected, path)
    return model


def converted_once(weights: Mapping[str, Tensor], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The same numbers in `dtype`, in pages that the processes of a machine share.

    Where the file has another dtype, one process of each machine writes a converted one into
    anonymous memory, which is given back when nobody maps it any more. A collective call.
    """
    if all(tensor.dtype == dtype for tensor in layout_of(weights).values()):
        return weights
    path = descriptor = None
    if distributed.local_rank() == 0:
        descriptor = os.memfd_create("weights")
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        layout = {n: tensor.to("meta", dtype) for n, tensor in layout_of(weights).items()}
        write_pth(layout, (tensor.to(dtype) for tensor in weights.values()), Path(path))
    machine = distributed.machine()
    shown = distributed.all_gather((machine, path))
    converted = read_tensors(next(p for where, p in shown if where == machine and p is not None))
    distributed.barrier()
    if descriptor is not None:
        os.close(descriptor)
    return converted


def model_sizes(path: str | Path) -> ModelSizes:
    """The sizes of the model in a weight file, which is mapped, not loaded."""
    return _told_of(path, sizes_of, layout_of(read_base(path)))


def _told_of(
    path: str | Path, work: Callable[[Mapping[str, Tensor]], T], weights: Mapping[str, Tensor]
) -> T:
    """work(weights); a UserError names the file."""
    try:
        return work(weights)
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error
