"""A cell of a table: a training and its evaluations, each a command line of its own.

A cell has a folder. Its `result.json` gets what each finished command gave, so that none is run
again; what was interrupted continues by the commands' own means: a training from its last
checkpoint, an evaluation from its last group of answers.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finchtune.distributed.launch import handling
from finchtune.distributed.lifetime import set_parent_death_signal
from finchtune.errors import UserError
from finchtune.files import read_json, remove, write_json

RESULT = "result.json"


@dataclass(frozen=True)
class Step:
    """A command, and how to read what it gave once it has ended well.

    `words` follow the Python interpreter. `settings` are what the outcome depends on. `spent` is
    removed when the outcome has been written down.
    """

    name: str
    words: tuple[str, ...]
    settings: dict[str, Any]
    outcome: Callable[[], dict[str, Any]]
    spent: Path | None = None


@dataclass(frozen=True)
class Cell:
    """Steps that follow one another, in a folder."""

    folder: Path
    steps: tuple[Step, ...]

    def results(self) -> dict[str, dict[str, Any]]:
        """What the finished steps gave, by name. UserError where one had other settings."""
        path = self.folder / RESULT
        found = read_json(path) if path.exists() else {}
        for step in self.steps:
            settings = found.get(step.name, {}).get("settings", step.settings)
            changed = sorted(
                key
                for key in settings.keys() | step.settings.keys()
                if settings.get(key) != step.settings.get(key)
            )
            if changed:
                old, new = settings.get(changed[0]), step.settings.get(changed[0])
                raise UserError(
                    f"{path}: {step.name} was run with another {changed[0]} ({old}, now {new}); "
                    "choose another --output"
                )
        return found

    def missing(self) -> list[Step]:
        """The steps that have not been finished."""
        found = self.results()
        return [step for step in self.steps if step.name not in found]

    def record(self, step: Step) -> None:
        """Write down what a finished step gave."""
        found = self.results() | {step.name: {"settings": step.settings, **step.outcome()}}
        write_json(self.folder / RESULT, found)
        if step.spent:
            remove(step.spent)


def places(jobs: int, devices: int) -> list[dict[str, str]]:
    """The environment of each of the cells that run side by side, with GPUs of its own if any.

    Raises UserError where there are fewer GPUs than asked for.
    """
    import torch

    cores = max(1, (os.cpu_count() or 1) // (jobs * devices))
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        return [threads] * jobs
    if jobs * devices > len(gpus):
        raise UserError(f"--jobs {jobs} with --devices {devices} each: {len(gpus)} GPUs are here")
    groups = (gpus[i * devices : (i + 1) * devices] for i in range(jobs))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


class Pool:
    """Runs cells side by side, one in each place. SIGTERM and SIGINT are passed on to them."""

    def __init__(self, environments: Sequence[dict[str, str]]):
        self.n = len(environments)
        self.free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for environment in environments:
            self.free.put(environment)
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = threading.Event()

    def run(self, cells: Sequence[Cell]) -> None:
        """Run what the cells lack; UserError naming those that failed, once all others are done."""
        waiting = [cell for cell in cells if cell.missing()]
        if len(waiting) < len(cells):
            print(f"{len(cells) - len(waiting)} of {len(cells)} cells are finished", flush=True)
        with (
            handling((signal.SIGTERM, signal.SIGINT), self._stop),
            ThreadPoolExecutor(self.n) as do,
        ):
            failures = [failure for failure in do.map(self._run_cell, waiting) if failure]
        if failures:
            raise UserError("; ".join(failures))

    def _stop(self, number: int, _: Any) -> None:
        self.stopped.set()
        for process in list(self.running):
            process.send_signal(number)

    def _run_cell(self, cell: Cell) -> str | None:
        environment = self.free.get()
        try:
            for step in cell.missing():
                if self.stopped.is_set():
                    return None
                log = cell.folder / f"{step.name}.log"
                status = self._run_step(step, log, environment)
                if self.stopped.is_set() and status:
                    return None
                if status:
                    return f"{cell.folder.name}: {step.name} failed ({last_line(log)}; {log})"
                cell.record(step)
                print(f"{cell.folder.name}: {step.name} done", flush=True)
        finally:
            self.free.put(environment)
        return None

    def _run_step(self, step: Step, log: Path, environment: dict[str, str]) -> int:
        parent = os.getpid()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *step.words],
                env=os.environ | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                # A session of its own: Ctrl-C on the terminal reaches it once, through us.
                start_new_session=True,
                preexec_fn=lambda: set_parent_death_signal(parent),
            )
            self.running.add(process)
            if self.stopped.is_set():
                process.terminate()
            try:
                return process.wait()
            finally:
                self.running.discard(process)


def last_line(log: Path) -> str:
    """The last line of a log."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
