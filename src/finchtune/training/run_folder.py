"""A run's folder: what may start in it, and what it may resume from."""

import dataclasses
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finchtune import distributed
from finchtune.config import TrainConfig, as_words
from finchtune.errors import CheckpointError, UserError
from finchtune.files import missing_parents, remove, remove_empty, remove_leftovers
from finchtune.training.checkpoints import (
    checkpoint_problem,
    checkpoints,
    newest_checkpoint,
    read_manifest,
)

LOCK = ".lock"
# What a run writes. wandb's folder is its own affair.
RUN_FILES = (
    *("rwkv-*.pth", "rwkv-*.json", "config.yaml", "metrics.jsonl", "skipped.jsonl"),
    *("run.json", "samples.jsonl", "loss.png", "report.html", "tensorboard", "checkpoints"),
)
# May lie in the folder of a new run.
HARMLESS = ("*.log", "*.out", "*.err", ".*", "wandb", "data_cache")


def choose_checkpoint(config: TrainConfig) -> Path | None:
    """The intact checkpoint to resume from; None to start anew. Changes nothing on the disk.

    Raises UserError for a damaged checkpoint, and for a proj_dir that holds something already
    unless --resume or --overwrite asks for it. A collective call: rank 0 looks.
    """
    return distributed.run_on_rank_zero(lambda: _choose_checkpoint(config))


def _choose_checkpoint(config: TrainConfig) -> Path | None:
    if config.resume and config.overwrite:
        raise CheckpointError("`resume` continues a run, `overwrite` throws it away; choose one")
    folder = Path(config.proj_dir)
    check_folder(folder)
    if config.resume == "auto":
        return _newest(folder)
    if config.resume:
        path = Path(config.resume)
        if not path.is_dir():
            raise CheckpointError(f"`resume` {path}: no such checkpoint folder")
        problem = checkpoint_problem(path)
        if problem:
            raise CheckpointError(
                f"`resume` {path}: {problem}; use `resume` auto or an earlier one"
            )
        return path
    if run_files(folder) and not config.overwrite:
        resume = "resume with `resume` auto, " if checkpoints(folder / "checkpoints") else ""
        raise UserError(
            f"`proj_dir` {folder} already holds a run; {resume}throw it away with `overwrite` 1, "
            "or choose another folder"
        )
    if foreign_files(folder) and not config.overwrite:
        raise UserError(
            f"`proj_dir` {folder} holds files that are no run's, such as "
            f"{foreign_files(folder)[0].name}; choose another folder, or write beside them with "
            "`overwrite` 1"
        )
    return None


def _newest(proj_dir: Path) -> Path | None:
    folder = proj_dir / "checkpoints"
    checkpoint, skipped = newest_checkpoint(folder)
    for line in skipped:
        distributed.print_rank_zero(f"warning: {line}")
    if checkpoint is None and checkpoints(folder):
        raise CheckpointError(
            f"`resume` auto: no checkpoint in {folder} is intact; start the run anew with "
            "`overwrite` 1 instead"
        )
    saved = sorted(proj_dir.glob("rwkv-*.pth"))
    if checkpoint is None and saved:
        raise CheckpointError(
            f"`resume` auto: {proj_dir} holds {saved[0].name} of a run without checkpoints, which "
            "cannot be resumed and would be written over; choose another `proj_dir`, or throw it "
            "away with `overwrite` 1 instead"
        )
    if checkpoint is None:
        distributed.print_rank_zero(f"there is no checkpoint in {folder}; starting anew")
    return checkpoint


def check_flags(checkpoint: Path, config: TrainConfig) -> None:
    """Raise UserError, naming them, for flags that a resumed run may not change but does.

    Before anything is built by them: what they change need not fit the checkpoint's tensors.
    """
    manifest, new = read_manifest(checkpoint), dataclasses.asdict(config)
    old = manifest.get("config")
    if not isinstance(old, dict):
        raise CheckpointError(f"`resume` {checkpoint}: its manifest holds no configuration")
    old = old | {"train_type": as_words(old.get("train_type"))}
    free = {field.name for field in dataclasses.fields(TrainConfig) if field.metadata["free"]}
    changed = [k for k in new if k not in free and old.get(k) != new[k]]
    told = [f"`{k}` {old.get(k)} -> {new[k]}" for k in changed]
    readers = config.readers(distributed.world_size())
    batch = config.global_bsz or config.micro_bsz * config.accumulate_grad_batches * readers
    if batch and "global_batch" in manifest:  # 0 while --micro_bsz auto is not resolved
        told += changed_batch(manifest.get("global_batch"), batch, readers)
    if told:
        raise CheckpointError(f"cannot resume with another configuration: {'; '.join(told)}")


def changed_batch(old: Any, new: int, readers: int) -> list[str]:
    """What to say of a step of `new` rows where the checkpoint's had `old`."""
    if old == new:
        return []
    return [
        f"global_batch {old} -> {new}: choose `micro_bsz` and `accumulate_grad_batches` so that "
        f"their product, times {readers} processes, is {old} again"
    ]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other run out of a folder. The lock ends with the process, however it ends.

    Raises UserError where another run holds it. A collective call: rank 0 takes the lock.
    """
    path, missing = folder / LOCK, missing_parents(folder / LOCK)
    descriptor = distributed.run_on_rank_zero(lambda: lock(path))
    try:
        yield
    finally:
        if distributed.rank() == 0:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            remove_empty(missing)


def lock(path: Path) -> int:
    """A descriptor that holds the lock of a run's folder. Raises UserError where it is taken."""
    check_folder(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
                return descriptor
            os.close(descriptor)  # the run that had it has just ended
    except BlockingIOError as error:
        raise UserError(
            f"`proj_dir` {path.parent}: another run is writing there ({holder(path)}); wait for "
            "it to end, or choose another folder"
        ) from error
    except OSError as error:
        raise UserError(f"`proj_dir` {path.parent}: cannot be written: {error.strerror}") from error


def holder(path: Path) -> str:
    """Who says that it holds a lock."""
    try:
        return path.read_text(errors="replace")[:100].strip() or "which has just begun"
    except OSError:
        return "which is about to end"


def check_folder(folder: Path) -> None:
    """Raise UserError for a run's folder that is a file, or leads elsewhere by a link."""
    for path in (folder, folder / "checkpoints"):
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to {path.resolve()}; a run writes only into its own folder: "
                "give `proj_dir` the place itself"
            )
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a folder; choose another `proj_dir`")


def run_files(folder: Path) -> list[Path]:
    """What an earlier run left in its folder."""
    return [path for name in RUN_FILES for path in folder.glob(name)]


def foreign_files(folder: Path) -> list[Path]:
    """What lies in a folder and is no run's."""
    known = (*RUN_FILES, *HARMLESS)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if not any(path.match(name) for name in known)]


def clean_folder(folder: Path, overwrite: bool) -> None:
    """Remove what killed processes left half-written; with `overwrite` the earlier run as well."""
    for path in run_files(folder) if overwrite else ():
        remove(path)
    for place in (folder, folder / "checkpoints", folder / "data_cache"):
        remove_leftovers(place)
