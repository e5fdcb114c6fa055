"""Killing what writes at every change that it makes to files, and looking at what is left."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import WRITERS, new_folder
from harness import copy_of, fault_of, half_written, run_verb
from helpers.kills import kill_everywhere
from samples import TRAIN

Outcome = Iterator[tuple[str, str, str | None]]
"""Kind, which kill, and what was wrong then (None if nothing)."""
SETS = {
    "merge": ("out.pth", "out.merge.json"),
    "convert": ("peft/adapter_config.json", "peft/adapter_model.safetensors"),
    "prepare": ("data.bin", "data.idx", "data.info.json"),
    "export": ("out.gguf", "out.gguf.export.json", "out.gguf.Modelfile"),
}
"""What must be there together, or not at all."""


def kill_writers(samples: Path, every: int) -> Outcome:
    """Each writer killed at its first, second, ... change; then done again."""
    for verb, names in SETS.items():
        command = WRITERS[verb]
        with copy_of(samples) as place:
            new_folder(place)
            whole = end_of(command, place, names)
            for number in kill_everywhere(in_place(command, place), place / "new", every):
                fault = what_is_left(place / "new", names, whole)
                if not fault and not digests(place / "new", names):
                    again = end_of(command, place, names)
                    fault = None if again == whole else "done again, it ends otherwise"
                yield f"{verb}, killed", f"at change {number}", fault
                shutil.rmtree(place / "new")
                new_folder(place)


def end_of(command: tuple[str, ...], place: Path, names: tuple[str, ...]) -> dict[str, str]:
    """What an undisturbed command writes; `new` is empty again."""
    end = run_verb(command, place)
    found = {"fault": fault_of(end) or ""} if end.status else {}
    found |= digests(place / "new", names) | {"left": str(half_written(place / "new"))}
    shutil.rmtree(place / "new")
    new_folder(place)
    return found


def digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Hashes of those of the files that are there."""
    paths = {name: folder / name for name in names if (folder / name).exists()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def what_is_left(folder: Path, names: tuple[str, ...], whole: dict[str, str]) -> str | None:
    """What a killed writer left that it must not: a part, or something else than the whole."""
    from finchtune.files import finish_interrupted

    finish_interrupted(folder)  # as whoever reads them does
    found = digests(folder, names)
    if found and found != {name: whole[name] for name in names}:
        return f"leaves {sorted(found)} of {sorted(names)}"
    return None


def kill_training(samples: Path, every: int) -> Outcome:
    """A run of three steps killed at each change in its folder, and resumed."""
    command = (*TRAIN, "--resume", "auto", "--overwrite", "0")
    with copy_of(samples) as place:
        shutil.rmtree(place / "run")
        end = run_verb(TRAIN, place)
        assert end.status == 0, end.err
        whole = trained(place)
        shutil.rmtree(place / "run")
        (place / "run").mkdir()
        for number in kill_everywhere(in_place(TRAIN, place), place / "run", every):
            end = run_verb(command, place)
            fault = fault_of(end)
            if fault is None and end.status:
                fault = None if "holds rwkv-" in end.err else f"cannot be resumed: {end.err[-200:]}"
            elif fault is None and trained(place) != whole:
                fault = "ends otherwise than an undisturbed run"
            left = half_written(place / "run")
            yield "train, killed", f"at change {number}", fault or (left[0] if left else None)
            shutil.rmtree(place / "run")
            (place / "run").mkdir()


def trained(place: Path) -> dict[str, str]:
    """The run's weights, its last checkpoint and the losses of its steps."""
    import json

    rows = (place / "run/metrics.jsonl").read_text().splitlines()
    losses = {str(row["step"]): repr(row["loss"]) for row in map(json.loads, rows)}
    return losses | digests(place / "run", ("rwkv-0.pth", "checkpoints/step-3/state.pth"))


def in_place(command: tuple[str, ...], place: Path) -> Callable[[], object]:
    """A verb done in the process that is to be killed."""

    def work() -> None:
        from importlib import import_module

        os.chdir(place)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (1, 2):
            os.dup2(null, number)
        verb, *words = command
        import_module(f"finchtune.cli.{verb}").main(words)

    return work


KILLS = (kill_writers, kill_training)
