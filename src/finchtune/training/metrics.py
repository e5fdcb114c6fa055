"""What a run tells: a progress line, metrics.jsonl; Weights & Biases and TensorBoard when asked."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finchtune.files import atomic_path

LINE_SECONDS = 2.0  # between two progress lines where there is no terminal


def peak_memory_mb() -> int:
    """Largest memory this process has used: GPU memory if it has one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, or another file of a row a step; damaged lines are left out.

    The last one may be cut short by a crash.
    """
    rows = []
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            rows.append(row)
    return rows


def rewind(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the rows after `step` from a .jsonl, atomically; returns the others. For one process."""
    rows = read_metrics(path) if path.exists() else []
    kept = [row for row in rows if row["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return kept


class Metrics:
    """Takes one row a step. Only rank 0 makes one; the other ranks have none to report to."""

    def __init__(self, folder: Path, total: int, start: int, config: dict[str, Any]):
        self.path, self.total, self.start = folder / "metrics.jsonl", total, start
        rewind(self.path, start)
        self.file = self.path.open("a", buffering=1)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not terminal)
        self.wandb = self._start_wandb(folder, config) if config.get("wandb") else None
        self.board = self._start_tensorboard(folder) if config.get("tensorboard") else None
        self.started, self.last_line = time.monotonic(), 0.0

    def _start_wandb(self, folder: Path, config: dict[str, Any]) -> Any:
        import wandb

        return wandb.init(project=config["wandb"], dir=str(folder), config=config)

    def _start_tensorboard(self, folder: Path) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote of the steps that now come again is hidden.
        return SummaryWriter(str(folder / "tensorboard"), purge_step=self.start + 1)

    def log(self, row: dict[str, Any]) -> None:
        """Record one step.

        `row` holds step (1-based), epoch, loss, lr, tokens_per_s, memory_mb and whatever else.
        """
        self.file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        if self.board:
            for name in row.keys() - {"step"}:
                self.board.add_scalar(name, row[name], row["step"])
        text = (
            f"epoch {row['epoch']}  "
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tok/s  "
            f"{row['memory_mb']:,} MB"
        )
        if "val_loss" in row:
            text = f"val loss {row['val_loss']:.4f}  {text}"
        self.bar.update(1)
        self.bar.set_postfix_str(text, refresh=False)
        now = time.monotonic()
        last = row["step"] == self.total
        if self.bar.disable and (last or "val_loss" in row or now - self.last_line >= LINE_SECONDS):
            self.last_line = now
            print(f"step {row['step']}/{self.total}  {text}  {self._eta(row['step'])}", flush=True)

    def _eta(self, step: int) -> str:
        seconds = (time.monotonic() - self.started) / (step - self.start) * (self.total - step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes}:{seconds:02d} left"

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()
        if self.board:
            self.board.close()
