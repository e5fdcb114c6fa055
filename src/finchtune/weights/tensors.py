"""Named tensors in .pth files: strict and safe reading, whole-or-nothing writing, checks."""

import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.errors import NotFinite, UserError
from finchtune.files import atomic_path
from finchtune.weights.pth import write_pth

WRAPPERS = ("state_dict", "model", "module")


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
    content = inner(content)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: entry {name!r} is a {type(tensor).__name__}; expected a flat dict of "
                "tensors, the form that RWKV weights are released in"
            )
    return content


def inner(content: Any) -> Any:
    """The dict of tensors in what a trainer saved around it; anything else is given back."""
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            return content[name]
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
