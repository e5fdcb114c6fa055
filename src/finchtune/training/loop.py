"""A training run from its configuration to its files.

What a step does, in order: draw its rows, forward, backward, update, log, save.
"""

import time
from pathlib import Path

import torch

from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.data.prefetch import prefetch
from finchtune.distributed.signals import StopRequest
from finchtune.errors import INTERRUPTED
from finchtune.report import plot_loss, write_report
from finchtune.training.batch_size import resolve_batch_size
from finchtune.training.engine import Engine
from finchtune.training.precision import choose_precision, set_matrix_precision
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
        return run(config, device)


def run(config: TrainConfig, device: torch.device) -> int:
    """A run in a folder that is its own."""
    checkpoint = choose_checkpoint(config)
    if checkpoint:
        distributed.run_on_rank_zero(lambda: check_flags(checkpoint, config))
    require_data(config)

    # The model, and what of it is trained.
    dtype = choose_precision(config, device.type)
    set_matrix_precision(config)
    torch.manual_seed(config.random_seed)
    model = build_model(config, dtype, device)
    state, manifest = restore_tensors(model, checkpoint) if checkpoint else ({}, {})
    distributed.print_rank_zero(f"model: {describe_parameters(model)} ({config.trained})")

    # The data, and how many steps it makes.
    data = open_data(config, model.config.vocab_size)
    config = resolve_batch_size(config, model, device, data.ctx_len)
    if not checkpoint:
        start_from_data(model, config, data, device)
    engine = Engine(model, config, device)
    saver = Saver(config, engine, data, manifest)
    schedule = Schedule(config, saver.global_batch, data.n_rows)
    total = schedule.total
    distributed.print_rank_zero(
        f"data: {data.n_rows:,} rows, {data.n_tokens:,} tokens; "
        f"{total:,} steps of {saver.global_batch} rows"
    )
    for name, text in data.report():
        distributed.print_rank_zero(f"  {name}: {text}")

    start = 0
    if checkpoint:
        engine.load_state(state)
        del state  # its file is mapped, and may be removed by --keep_last
        start = manifest["step"]
        finished = "; this run is finished, nothing is left to do" if start >= total else ""
        distributed.print_rank_zero(
            f"resumed from {checkpoint} at step {start} of {total}{finished}"
        )

    validation = Validation(config, engine, data.validation, schedule, manifest)
    samples = Samples(config, model, saver.folder, schedule, start)
    metrics = saver.open_metrics(total, start)
    mine = distributed.rank() // config.context_parallel, engine.readers
    cut = config.micro_bsz, config.accumulate_grad_batches
    drawn = (data.rows(step, *mine, *cut) for step in range(start, total))
    if device.type == "cuda":
        drawn = ([batch.pinned() for batch in rows] for rows in drawn)
    rows_ahead = prefetch(drawn)
    watch = StepWatch(config, saver.folder, data, saver.global_batch, start, total)
    stop = StopRequest(distributed.watch_runner())  # by SIGTERM or SIGINT
    status = 0
    for step in range(start, total):
        if validation.exhausted:
            distributed.print_rank_zero(
                f"no better validation loss than step {validation.best[0]}'s: stopped"
            )
            break
        began = time.perf_counter()
        # Rows and dropout are functions of seed, step and rank: resuming needs no more than `step`.
        torch.manual_seed(hash((config.random_seed, step, distributed.rank())))
        lr = schedule.learning_rate(step)
        result = engine.step(next(rows_ahead), lr, bool(stop))
        watch.check(step, result)
        seconds = time.perf_counter() - began

        done = step + 1
        epoch = schedule.epoch(done)
        val_loss = validation.loss(done)
        if metrics and not result.skipped:
            row = {"step": done, "epoch": epoch, "lr": lr, **result.measured(seconds)}
            metrics.log(row if val_loss is None else row | {"val_loss": val_loss})
        samples.write(done)
        if val_loss is not None and validation.is_best(done):
            saver.save_best(done, val_loss)
        if schedule.saves_epoch(done):
            saver.save_epoch(epoch, done)
        if schedule.saves_checkpoint(done) or result.stopping:
            saver.save_checkpoint(done, {"validation": validation.history})
        if result.stopping and done < total:
            distributed.print_rank_zero(
                f"stopped after step {done}, saved; resume with --resume auto"
            )
            status = INTERRUPTED
            break

    if metrics:
        metrics.close()
        picture = plot_loss(saver.folder, saver.folder / "loss.png")
        report = write_report([saver.folder], saver.folder / "report.html")
        distributed.print_rank_zero(f"loss picture: {picture}\nreport: {report}")
    status = status or watch.status()
    distributed.shutdown()
    return status
