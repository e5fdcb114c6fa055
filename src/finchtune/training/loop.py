"""A training run from its configuration to its files.

What a step does, in order: draw its rows, forward, backward, update, log, save.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.data import Batch, Data
from finchtune.data.prefetch import prefetch
from finchtune.distributed.signals import StopRequest
from finchtune.errors import INTERRUPTED
from finchtune.models import LanguageModel
from finchtune.report import plot_loss, write_report
from finchtune.training.batch_size import resolve_batch_size
from finchtune.training.engine import Engine, StepResult
from finchtune.training.precision import check_device, choose_precision, set_matrix_precision
from finchtune.training.run_folder import check_flags, choose_checkpoint, locked
from finchtune.training.samples import Samples
from finchtune.training.saver import Saver, restore_tensors
from finchtune.training.schedule import Schedule
from finchtune.training.setup import (
    build_model,
    check_processes,
    describe_parameters,
    open_data,
    require_data,
    start_from_data,
)
from finchtune.training.validation import Validation
from finchtune.training.watch import StepWatch


def train(config: TrainConfig) -> int:
    """This process's part of a run, from the flags to the files; returns the exit status."""
    device = distributed.pick_device(config.accelerator)
    distributed.init_process_group(device, config.timeout_minutes)
    check_processes(config)
    with locked(Path(config.proj_dir)):
        run = prepare(config, device)
        status = run.steps()
        run.close()
        status = status or run.watch.status()
        distributed.shutdown()
        return status


def prepare(config: TrainConfig, device: torch.device) -> "Run":
    """A run before its first step, or as the checkpoint left it that it resumes from."""
    checkpoint = choose_checkpoint(config)
    if checkpoint:
        distributed.run_on_rank_zero(lambda: check_flags(checkpoint, config))
    require_data(config)
    model = prepare_model(config, device)
    state, manifest = restore_tensors(model, checkpoint) if checkpoint else ({}, {})
    distributed.print_rank_zero(f"model: {describe_parameters(model)} ({config.trained})")
    data = open_data(config, model.config.vocab_size)
    config = resolve_batch_size(config, model, device, data.ctx_len)
    if not checkpoint:
        start_from_data(model, config, data, device)
    engine = Engine(model, config, device)
    saver = Saver(config, engine, data, manifest)
    schedule = Schedule(config, saver.global_batch, data.n_rows)
    describe_data(data, schedule)
    if checkpoint:
        # Its file is mapped, and --keep_last may remove it: nothing holds it during the steps.
        engine.load_state(state)
        describe_resumed(checkpoint, manifest["step"], schedule.total)
    return Run(config, engine, data, saver, schedule, manifest)


def prepare_model(config: TrainConfig, device: torch.device) -> LanguageModel:
    """The model with its adapters in the run's precision, drawn from the run's seed."""
    check_device(config, device)
    dtype = choose_precision(config, device.type)
    set_matrix_precision(config)
    torch.manual_seed(config.random_seed)
    return build_model(config, dtype, device)


def describe_data(data: Data, schedule: Schedule) -> None:
    """Print how many rows and steps there are, and what becomes of the labels."""
    distributed.print_rank_zero(
        f"data: {data.n_rows:,} rows, {data.n_tokens:,} tokens; "
        f"{schedule.total:,} steps of {schedule.global_batch} rows"
    )
    for name, text in data.report():
        distributed.print_rank_zero(f"  {name}: {text}")


def describe_resumed(checkpoint: Path, start: int, total: int) -> None:
    """Print where a run continues."""
    finished = "; this run is finished, nothing is left to do" if start >= total else ""
    distributed.print_rank_zero(f"resumed from {checkpoint} at step {start} of {total}{finished}")


class Run:
    """A run that is ready for its steps."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        data: Data,
        saver: Saver,
        schedule: Schedule,
        manifest: dict[str, Any],
    ):
        """`manifest` is that of the checkpoint to resume from, empty for a new run."""
        start = manifest.get("step", 0)
        self.remaining = range(start, schedule.total)
        self.config, self.engine, self.data = config, engine, data
        self.saver, self.schedule = saver, schedule
        self.validation = Validation(config, engine, data.validation, schedule, manifest)
        self.samples = Samples(config, engine.model, saver.folder, schedule, start)
        self.metrics = saver.open_metrics(schedule.total, start)
        self.watch = StepWatch(config, saver.folder, data, schedule, start)
        self.stop = StopRequest(distributed.watch_runner())  # by SIGTERM or SIGINT

    def steps(self) -> int:
        """Take all steps that remain; returns INTERRUPTED if a signal ended them early, else 0."""
        rows = prefetch(self.rows())
        for step in self.remaining:
            if self.validation.exhausted:
                best = self.validation.best[0]
                distributed.print_rank_zero(
                    f"no better validation loss than step {best}'s: stopped"
                )
                break
            result, seconds = self.step(step, rows)
            self.after_step(step + 1, result, seconds)
            if result.stopping and step + 1 < self.schedule.total:
                distributed.print_rank_zero(
                    f"stopped after step {step + 1}, saved; resume with --resume auto"
                )
                return INTERRUPTED
        return 0

    def rows(self) -> Iterator[list[Batch]]:
        """This rank's micro batches of each step that remains."""
        config, engine = self.config, self.engine
        reader = distributed.rank() // config.context_parallel
        cut = config.micro_bsz, config.accumulate_grad_batches
        on_gpu = engine.device.type == "cuda"
        for step in self.remaining:
            batches = self.data.rows(step, reader, engine.readers, *cut)
            yield [batch.pinned() for batch in batches] if on_gpu else batches

    def step(self, step: int, rows: Iterator[list[Batch]]) -> tuple[StepResult, float]:
        """One step, counted from 0: its result, and the seconds that it took."""
        began = time.perf_counter()
        # Rows and dropout are functions of seed, step and rank: resuming needs no more than `step`.
        torch.manual_seed(hash((self.config.random_seed, step, distributed.rank())))
        lr = self.schedule.learning_rate(step)
        result = self.engine.step(next(rows), lr, bool(self.stop))
        self.watch.check(step, result)
        return result, time.perf_counter() - began

    def after_step(self, done: int, result: StepResult, seconds: float) -> None:
        """Log, write samples and save what is due."""
        epoch = self.schedule.epoch(done)
        val_loss = self.validation.loss(done)
        if self.metrics and not result.skipped:
            lr = self.schedule.learning_rate(done - 1)
            row = {"step": done, "epoch": epoch, "lr": lr, **result.measured(seconds)}
            self.metrics.log(row if val_loss is None else row | {"val_loss": val_loss})
        self.samples.write(done)
        if val_loss is not None and self.validation.is_best(done):
            self.saver.save_best(done, val_loss)
        if self.schedule.saves_epoch(done):
            self.saver.save_epoch(epoch, done)
        if self.schedule.saves_checkpoint(done) or result.stopping:
            self.saver.save_checkpoint(done, {"validation": self.validation.history})

    def close(self) -> None:
        """Close the metrics, draw the loss and write the report."""
        if self.metrics:
            self.metrics.close()
            folder = self.saver.folder
            picture = plot_loss(folder, folder / "loss.png")
            report = write_report([folder], folder / "report.html")
            distributed.print_rank_zero(f"loss picture: {picture}\nreport: {report}")
