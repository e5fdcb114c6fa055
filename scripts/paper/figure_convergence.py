"""Convergence of Bone, Bat, LoRA, PiSSA and OLoRA at equal trainable parameters (DiSHA, figure 5).

Every method runs at each of the learning rates with the first seed; the rate with the lowest mean
loss of the last 20 steps is its own, and with that it runs the other seeds. Each run is a JSON file
in --out and is not run again, so an interrupted call is simply repeated; several calls with
different --methods or --lrs may work on one folder side by side. A call that finds every run done
draws the picture and prints the table.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finchtune import attach, load_model
from finchtune.data import Data, load_data
from finchtune.errors import UserError, run_cli
from finchtune.files import read_json, write_json
from finchtune.models.rwkv6 import RWKV6
from finchtune.report import running_mean
from finchtune.tokenizer import load_tokenizer
from finchtune.training.optim import adamw, learning_rate, parameter_groups, set_learning_rate

LAST = 20  # steps at the end of a run whose mean loss ranks it
WARMUP = 10
MAX_NORM = 1.0
METHODS = ("bone", "bat", "lora", "pissa", "olora")


def hyperparameters(method: str, r: int) -> dict[str, Any]:
    """Bone and Bat with blocks of r; on an RWKV-6 a rank of r / 2 trains as many parameters."""
    if method in ("bone", "bat"):
        return {"r": r}
    return {"r": r // 2} if method == "pissa" else {"r": r // 2, "alpha": r // 2}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a folder have in common; a folder with other settings is refused."""

    model: str
    data_file: str
    test_file: str
    sft_field: list[str]
    r: int
    steps: int
    micro_bsz: int
    ctx_len: int
    test_rows: int


def main() -> None:
    given = parse()
    settings = Settings(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Settings)})
    torch.set_num_threads(given.threads)
    out, first = Path(given.out), given.seeds[0]
    for method in given.methods:
        grid = [run(out, settings, method, lr, first) for lr in given.lrs]
        lr = min(grid, key=final_loss)["lr"]
        if not given.grid_only:
            for seed in given.seeds[1:]:
                run(out, settings, method, lr, seed)
    found = [read_run(path, settings) for path in sorted(out.glob("run-*.json"))]
    best = {m: best_runs([r for r in found if r["method"] == m], given.seeds) for m in METHODS}
    if not all(best.values()):
        print(f"not drawn yet: runs of {', '.join(m for m in METHODS if not best[m])} are missing")
        return
    print(table(found, best))
    draw(best, Path(given.picture or out / "convergence.png"))
    write_json(out / "convergence.json", {"settings": dataclasses.asdict(settings), "runs": found})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="base weights, an RWKV-6 .pth")
    parser.add_argument("--data_file", required=True, help=".jsonl to train on")
    parser.add_argument("--test_file", required=True, help=".jsonl that is held out")
    parser.add_argument("--sft_field", nargs="+", default=["question", "answer"])
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--picture", help="default OUT/convergence.png")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 2.5e-3, 6e-3, 1.5e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--grid_only", action="store_true", help="no more than the first seed")
    parser.add_argument("--r", type=int, default=8, help="Bone's and Bat's r; LoRA gets half")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--micro_bsz", type=int, default=4, help="rows in a step")
    parser.add_argument("--ctx_len", type=int, default=256)
    parser.add_argument("--test_rows", type=int, default=128, help="held-out rows of ctx_len")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.r < 2 or given.r % 2 or given.steps < LAST:
        raise UserError(f"--r must be even, and --steps at least {LAST}")
    return given


def run(out: Path, settings: Settings, method: str, lr: float, seed: int) -> dict[str, Any]:
    """One run's record, from its file or by running it."""
    path = out / f"run-{method}-{lr:g}-{seed}.json"
    if path.exists():
        return read_run(path, settings)
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = load_model(settings.model, dtype=torch.float32)
    attach(model, method, **hyperparameters(method, settings.r))
    losses = list(train(model, rows_of(settings, settings.data_file, model, seed), settings, lr))
    record = {
        "method": method,
        "lr": lr,
        "seed": seed,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses": losses,
        "held_out": held_out_loss(model, rows_of(settings, settings.test_file, model, 0), settings),
        "seconds": time.perf_counter() - began,
        "settings": dataclasses.asdict(settings),
    }
    write_json(path, record)
    print(
        f"{method} lr {lr:g} seed {seed}: last {LAST} {final_loss(record):.4f}, held out "
        f"{record['held_out']:.4f}, {record['seconds']:.0f} s",
        flush=True,
    )
    return record


def read_run(path: Path, settings: Settings) -> dict[str, Any]:
    record = read_json(path)
    if record["settings"] != dataclasses.asdict(settings):
        raise UserError(f"{path} was run with other settings; choose another --out")
    return record


def rows_of(settings: Settings, file: str, model: RWKV6, seed: int) -> Data:
    """Windows of ctx_len tokens of a file's text, questions and answers alike."""
    vocab_size = model.config.vocab_size
    return load_data(
        file,
        "sft",
        "get",
        settings.ctx_len,
        sft_field=settings.sft_field,
        tokenizer=load_tokenizer(None, vocab_size),
        vocab_size=vocab_size,
        seed=seed,
    )


def train(model: RWKV6, data: Data, settings: Settings, lr: float) -> Iterator[float]:
    """Train for settings.steps steps; yields the mean loss per token before each."""
    optimizer = adamw(parameter_groups(model.named_parameters()), lr, (0.9, 0.99), 1e-8)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(settings.steps):
        rate = learning_rate(step, settings.steps, lr, lr, "constant", WARMUP)
        set_learning_rate(optimizer.param_groups, rate)
        (batch,) = data.rows(step, 0, 1, settings.micro_bsz, 1)
        loss = model.loss(batch.tokens, batch.labels)[0] / batch.labels.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def held_out_loss(model: RWKV6, data: Data, settings: Settings) -> float:
    """Mean loss per token over settings.test_rows rows."""
    steps = -(-settings.test_rows // settings.micro_bsz)
    batches = [data.rows(step, 0, 1, settings.micro_bsz, 1)[0] for step in range(steps)]
    tokens = sum(batch.labels.numel() for batch in batches)
    return sum(model.loss(batch.tokens, batch.labels)[0].item() for batch in batches) / tokens


def final_loss(record: dict[str, Any]) -> float:
    """Mean loss of the last steps; infinite for a run that diverged to NaN."""
    loss = statistics.fmean(record["losses"][-LAST:])
    return loss if loss == loss else float("inf")


def best_runs(runs: list[dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
    """A method's run of each seed at its own learning rate; empty if one is missing."""
    grid = [r for r in runs if r["seed"] == seeds[0]]
    if not grid:
        return []
    lr = min(grid, key=final_loss)["lr"]
    chosen = {r["seed"]: r for r in runs if r["lr"] == lr}
    return [chosen[seed] for seed in seeds] if all(seed in chosen for seed in seeds) else []


def table(found: list[dict[str, Any]], best: dict[str, list[dict[str, Any]]]) -> str:
    """Two Markdown tables: the learning rates tried, and each method at its own."""
    first = next(iter(best.values()))[0]["seed"]
    rates = sorted({r["lr"] for r in found})
    third = max(10, len(found[0]["losses"]) // 3)
    lines = [
        f"Mean loss of the last {LAST} steps, seed {first}, by learning rate:\n",
        "| | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for method in METHODS:
        by_rate = {r["lr"]: r for r in found if r["method"] == method and r["seed"] == first}
        cells = [f"{final_loss(by_rate[lr]):.3f}" if lr in by_rate else "-" for lr in rates]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += [
        "\nAt its own learning rate, one figure a seed:\n",
        f"| | trained | lr | steps 1-10 | steps {third - 9}-{third} | last {LAST} | held out |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in best.items():
        parts = [
            [statistics.fmean(r["losses"][:10]) for r in runs],
            [statistics.fmean(r["losses"][third - 10 : third]) for r in runs],
            [final_loss(r) for r in runs],
            [r["held_out"] for r in runs],
        ]
        cells = [", ".join(f"{value:.3f}" for value in part) for part in parts]
        start = f"| {method} | {runs[0]['trained']:,} | {runs[0]['lr']:g} | "
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(best: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Loss curves, the mean of the seeds smoothed over 10 steps: all steps, and the first 100."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for method, runs in best.items():
        mean = [statistics.fmean(step) for step in zip(*(r["losses"] for r in runs), strict=True)]
        curve = running_mean(mean, 10)
        for axes, steps in zip(panels, (len(curve), 100), strict=True):
            axes.plot(range(1, len(curve[:steps]) + 1), curve[:steps], linewidth=1.2,
                      label=f"{method}, lr {runs[0]['lr']:g}")  # fmt: skip
    for axes in panels:
        axes.set(xlabel="step", ylabel="loss (nats per token), mean of 10 steps", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    run_cli(main)
