"""Named tensors in .pth files: strict and safe reading, whole-or-nothing writing, checks."""

import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.errors import CheckpointError, NotFinite
from finchtune.files import atomic_path, finish_interrupted
from finchtune.weights.pth import write_pth

WRAPPERS = ("state_dict", "model", "module")  # keys of what a trainer saves around the weights
PREFIXES = ("module.", "_orig_mod.", "model.")
UNFOLDED = 1 << 30  # bytes that an expanded tensor may take
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The flat dict of tensors in a .pth file, memory-mapped where the format allows.

    Never runs code from the file. Raises UserError, naming the file, if it is missing, damaged,
    or holds anything but named tensors.
    """
    path = Path(path)
    finish_interrupted(path.parent)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    size = f"{path.stat().st_size:,} bytes"
    try:
        # Only torch's zip format can be mapped; older files are read whole.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} ({size}): refused, it is no plain weight file: it holds objects that could "
            "run code, or is damaged; get it from a source you trust"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} ({size}): damaged or cut short ({error}); download or copy it again"
        ) from error
    content = inner(content)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(tensor).__name__}; expected a flat dict of "
                "tensors, the form that RWKV weights are released in"
            )
    return separate(content, path)


def separate(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same numbers, contiguous, each tensor with memory of its own.

    Files may hold transposed and expanded tensors and one under two names, none of which can be
    trained in place. Raises UserError for what is no plain tensor of floating-point numbers.
    """
    places: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path}: {name} is a {'' if tensor.layout is torch.strided else 'sparse '}"
                f"tensor of {kind}, not of floating-point numbers; weights are fp32, bf16 or fp16"
            )
        if tensor.nbytes > max(tensor.untyped_storage().nbytes(), UNFOLDED):
            raise CheckpointError(
                f"{path}: {name} of {list(tensor.shape)} unfolds to {tensor.nbytes:,} bytes, of "
                f"which the file holds {tensor.untyped_storage().nbytes():,}; it is no weight"
            )
        tensor = tensor.detach().contiguous()
        if tensor.numel() and tensor.data_ptr() in places:
            tensor = tensor.clone()
        places.add(tensor.data_ptr())
        found[name] = tensor
    return found


def inner(content: Any) -> Any:
    """The dict of tensors in what a trainer saved around it; anything else is given back."""
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            return content[name]
    return content


def unwrapped(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without a wrapper's prefix, which stands before all of their names."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            return unwrapped({name.removeprefix(prefix): t for name, t in weights.items()})
    return weights


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, stream: Iterable[Tensor] | None = None
) -> str:
    """Write a flat dict of tensors atomically, each stored by itself, contiguous; returns sha256.

    Where they are not all in memory, `tensors` has only their shapes and dtypes, and `stream`
    yields them in the same order.
    """
    with atomic_path(path) as temporary:
        return write_pth(tensors, tensors.values() if stream is None else stream, temporary)


def check_shapes(
    found: dict[str, tuple[Any, ...]], expected: dict[str, tuple[Any, ...]], path: str | Path
) -> None:
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
        raise CheckpointError(f"{path} does not fit: {'; '.join(problems[:5])}{more}")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # Its extremes show NaN too, and take no memory, as a mask of a large tensor would.
    return not tensor.numel() or all(map(torch.isfinite, torch.aminmax(tensor.detach())))


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise UserError, naming it, for a tensor of the file `path` that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity (as {dtype}); the file is damaged, or its "
                "numbers do not fit this precision"
            )


def finite(names: Iterable[str], tensors: Iterable[Tensor], path: Path) -> Iterator[Tensor]:
    """The same tensors. Raises NotFinite, naming it, at one that holds NaN or infinity."""
    for name, tensor in zip(names, tensors, strict=True):
        if not is_finite(tensor):
            raise NotFinite(
                f"{name} holds NaN or infinity; {path} is not written, earlier files stay; a run "
                "resumes from an earlier checkpoint, with a lower `lr_init` or `grad_clip`"
            )
        yield tensor
