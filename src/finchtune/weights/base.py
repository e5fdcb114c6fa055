"""Weights in and out: strict and safe loading, whole-or-nothing writing, adapter files."""

import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from finchtune import distributed
from finchtune.errors import NotFinite, UserError
from finchtune.files import atomic_path
from finchtune.models.rwkv6 import RWKV6, ModelConfig
from finchtune.weights.pth import write_pth

SHIFT_VECTOR = re.compile(r"time_(maa_[xwkvrg]|decay)$")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The flat dict of tensors in a .pth file, memory-mapped where the format allows.

    Never runs code from the file. Raises UserError, naming the file, if it is missing, damaged,
    or holds anything but named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    size = f"{path.stat().st_size:,} bytes"
    try:
        # Only torch's zip format can be mapped; older files are read whole.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} ({size}): refused, it is no plain weight file: it holds objects that could "
            "run code, or is damaged; get it from a source you trust"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} ({size}): damaged or cut short ({error}); download or copy it again"
        ) from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: entry {name!r} is a {type(tensor).__name__}; expected a flat dict of "
                "tensors, the form that RWKV weights are released in"
            )
    return content


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, stream: Iterable[Tensor] | None = None
) -> str:
    """Write a flat dict of tensors atomically, each stored by itself, contiguous; returns sha256.

    Where they are not all in memory, `tensors` has only their shapes and dtypes, and `stream`
    yields them in the same order.
    """
    with atomic_path(path) as temporary:
        return write_pth(tensors, tensors.values() if stream is None else stream, temporary)


def read_base(path: str | Path) -> dict[str, Tensor]:
    """A base model's tensors; token-shift vectors stored as plain C are viewed as 1,1,C."""
    weights = read_tensors(path)
    for name, tensor in weights.items():
        if SHIFT_VECTOR.search(name) and tensor.dim() == 1:
            weights[name] = tensor.view(1, 1, -1)
    return weights


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    grad_checkpoint: int = 0,
    shared: bool = False,
) -> RWKV6:
    """An RWKV-6 from an official weight file; every size is read off the tensors.

    `dtype` defaults to the file's own, `device` to the CPU. With `shared` all processes of the run
    load the same file, a collective call, and those of a machine hold one copy of it on the host.
    Raises UserError listing every missing, extra or misshapen tensor.
    """
    weights = read_base(path)
    config = _sizes_of(weights, path)
    with torch.device("meta"):
        model = RWKV6(config, grad_checkpoint)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    check_shapes({name: tuple(t.shape) for name, t in weights.items()}, expected, path)
    dtype = dtype or weights["emb.weight"].dtype
    if shared:
        weights = converted_once(weights, dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.to(device=device, dtype=dtype)


def converted_once(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same numbers in `dtype`, in pages that the processes of a machine share.

    Where the file has another dtype, one process of each machine writes a converted one into
    anonymous memory, which is given back when nobody maps it any more. A collective call.
    """
    if all(tensor.dtype == dtype for tensor in weights.values()):
        return weights
    path = descriptor = None
    if distributed.local_rank() == 0:
        descriptor = os.memfd_create("weights")
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        layout = {name: tensor.to("meta", dtype) for name, tensor in weights.items()}
        write_pth(layout, (tensor.to(dtype) for tensor in weights.values()), Path(path))
    machine = distributed.machine()
    shown = distributed.all_gather((machine, path))
    converted = read_tensors(next(p for where, p in shown if where == machine and p is not None))
    distributed.barrier()
    if descriptor is not None:
        os.close(descriptor)
    return converted


def model_sizes(path: str | Path) -> ModelConfig:
    """The sizes of the model in an official weight file, which is mapped, not loaded."""
    return _sizes_of(read_base(path), path)


def _sizes_of(weights: dict[str, Tensor], path: str | Path) -> ModelConfig:
    try:
        return ModelConfig.from_weights(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_shapes(found: dict[str, tuple], expected: dict[str, tuple], path: str | Path) -> None:
    """Raise UserError unless both hold the same names with the same shapes."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not known" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path} does not fit: {'; '.join(problems[:5])}{more}")


def finite(names: Iterable[str], tensors: Iterable[Tensor], path: Path) -> Iterator[Tensor]:
    """The same tensors. Raises NotFinite, naming it, at one that holds NaN or infinity."""
    for name, tensor in zip(names, tensors, strict=True):
        # Their extremes show NaN too, and take no memory, as a mask of a large tensor would.
        if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            raise NotFinite(
                f"{name} holds NaN or infinity; {path} is not written, earlier files stay; a run "
                "goes on from an earlier checkpoint, with a lower --lr_init or --grad_clip"
            )
        yield tensor
