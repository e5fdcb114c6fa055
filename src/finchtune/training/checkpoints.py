"""Checkpoints that a run resumes from exactly: written, found, checked and read."""

import json
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.errors import CheckpointError, UserError
from finchtune.files import (
    atomic_folder,
    check_sums,
    discard,
    finish_interrupted,
    read_json,
    require_space,
    sha256,
    sums_text,
)
from finchtune.weights.pth import tensors_of, write_pth
from finchtune.weights.tensors import finite

STATE, MANIFEST, SUMS = "state.pth", "manifest.json", "manifest.sha256"
NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
SPARE_BYTES = 1 << 20  # what a checkpoint takes besides its tensors, amply


def save_checkpoint(
    folder: Path,
    step: int,
    layout: dict[str, Any],
    tensors: Iterable[Tensor],
    record: dict[str, Any],
    keep_last: int = 0,
) -> Path:
    """Write `folder`/step-N atomically: the state, the manifest with its hash, the manifest's hash.

    `layout` is the state with the shapes and dtypes of its tensors, which `tensors` yields in the
    same order. With `keep_last` all but the newest so many are removed then; the one just written
    stays. Raises UserError, and leaves the earlier ones as they are, if a tensor is not finite or
    there is no room.
    """
    path = folder / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, sum(tensor.nbytes for tensor in tensors_of(layout)) + SPARE_BYTES)
    with atomic_folder(path) as temporary:
        good = finite(tensor_names(layout), tensors, path)
        digest = write_pth(layout, good, temporary / STATE)
        steps = {"step": step, "optimizer_step": layout.get("adam_step")}
        manifest = record | steps | {"sha256": {STATE: digest}}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        (temporary / SUMS).write_text(sums_text({MANIFEST: sha256(temporary / MANIFEST)}))
    others = [other for other in checkpoints(folder) if other != path]
    for other in others[keep_last - 1 :] if keep_last else ():
        discard(other)
    return path


def tensor_names(layout: dict[str, Any]) -> Iterator[str]:
    """What each tensor of a state is, e.g. exp_avg of blocks.0.att.key.weight."""
    for part, tensors in layout.items():
        for name, tensor in tensors.items() if isinstance(tensors, dict) else ():
            if isinstance(tensor, Tensor):
                yield f"{part} of {name}"


def checkpoints(folder: Path) -> list[Path]:
    """The step-N under `folder`, newest first, intact or not."""
    finish_interrupted(folder)
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def checkpoint_problem(path: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, or None if it is intact."""
    finish_interrupted(path.parent)
    try:
        check_sums(path / SUMS, {MANIFEST})
        manifest = read_json(path / MANIFEST)
        digests, step = manifest["sha256"], manifest["step"]
        if set(digests) != {STATE}:
            return f"its manifest vouches for {sorted(digests)} instead of {STATE}"
        if NAME.fullmatch(path.name) and path.name != f"step-{step}":
            return f"its manifest is of step {step}; give the folder its own name again"
        if sha256(path / STATE) != digests[STATE]:
            size = (path / STATE).stat().st_size
            return f"{STATE} ({size:,} bytes) does not match its checksum"
    except (UserError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"no usable manifest ({error})"
    return None


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact step-N under `folder`, and a line for each damaged one passed over."""
    skipped: list[str] = []
    for path in checkpoints(folder):
        problem = checkpoint_problem(path)
        if problem is None:
            return path, skipped
        skipped.append(f"checkpoint {path} is passed over: {problem}")
    return None, skipped


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, manifest) of an intact checkpoint folder, its tensors mapped, not read.

    `choose_checkpoint` has checked it. Raises UserError if it holds anything but tensors.
    """
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{path / STATE}: refused, it is no checkpoint of finchtune or is damaged; "
            "use `resume` auto or an earlier checkpoint"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE}: holds a {type(state).__name__}, not a state")
    manifest = read_manifest(path)
    if state.get("adam_step") != manifest.get("optimizer_step"):
        raise CheckpointError(
            f"{path}: the optimizer made {state.get('adam_step')} steps in {STATE} but "
            f"{manifest.get('optimizer_step')} in {MANIFEST}; use an earlier checkpoint"
        )
    return state, manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint that `choose_checkpoint` has checked says of itself."""
    return read_json(path / MANIFEST)
