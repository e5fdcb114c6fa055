"""Trained states beside Bone and LoRA, each at its own best learning rate.

Every method trains the same rows, the beginnings of documents, at each rate of its grid; the rate
with the lowest mean loss of the last steps is its own. Text is read as UTF-16 bytes, which fits a
model of 256 tokens that was trained so. Each run is a JSON file in --out and is not run again, so
that an interrupted call is simply repeated. Prints a table and draws the best runs' losses.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finchtune import attach, load_model
from finchtune.data.batch import Batch, padded
from finchtune.data.sampling import Segment
from finchtune.files import read_json, write_json
from finchtune.report import running_mean

GRID: dict[str, tuple[dict[str, int], list[float]]] = {
    "lora": ({"r": 8, "alpha": 8}, [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]),
    "bone": ({"r": 16}, [5e-4, 1e-3, 2e-3, 5e-3, 1e-2]),
    "state": ({}, [0.1, 1, 10, 100]),
}
"""Method -> its hyperparameters and the rates that it is run at."""
LAST = 10  # steps at the end of a run whose mean loss ranks it


def documents(path: Path) -> list[np.ndarray]:
    """Each record's question and answer as UTF-16 bytes after a zero."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [f"{record['question']}\n{record['answer']}\n" for record in records]
    return [np.frombuffer(b"\0" + text.encode("utf-16-le"), np.uint8) for text in texts]


def batch_of(found: list[np.ndarray], first: int, rows: int, tokens: int) -> Batch:
    """Rows of the beginnings of documents, from number `first` on."""
    chosen = (first + np.arange(rows)) % len(found)
    return padded([Segment(found[i][: tokens + 1], None, int(i)) for i in chosen], tokens)


def adapted(path: Path, method: str) -> torch.nn.Module:
    """The model of which the method's tensors alone are trained."""
    model = load_model(path, dtype=torch.float32)
    if method != "state":
        return attach(model, method, **GRID[method][0])
    model.requires_grad_(False)
    model.add_initial_state()
    for state in model.initial_states().values():
        state.requires_grad_(True)
    return model


def mean_loss(model: Any, batch: Batch) -> torch.Tensor:
    return model.loss(*batch)[0] / int((batch.labels != -100).sum())


def run(given: argparse.Namespace, method: str, rate: float) -> dict[str, Any]:
    """One run's record, from its file or by running it."""
    path = given.out / f"{method}-{rate:g}.json"
    if path.exists():
        return read_json(path)
    torch.manual_seed(0)
    model = adapted(given.model, method)
    train = documents(given.train)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(given.steps):
        loss = mean_loss(model, batch_of(train, step * given.rows, given.rows, given.tokens))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    held_out = held_out_loss(given, model)
    record = {"method": method, "rate": rate, "trained": sum(p.numel() for p in trained)}
    record |= {"losses": losses, "last": float(np.mean(losses[-LAST:])), "held_out": held_out}
    write_json(path, record)
    print(f"{method} {rate:g}: {record['last']:.3f}, held out {held_out:.3f}", file=sys.stderr)
    return record


@torch.no_grad()
def held_out_loss(given: argparse.Namespace, model: Any) -> float:
    rows = batch_of(documents(given.test), 0, given.test_rows, given.tokens)
    return mean_loss(model, rows).item()


def draw(best: list[dict[str, Any]], picture: Path) -> None:
    """The best runs' losses, averaged over a few steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for one in best:
        axes.plot(running_mean(one["losses"], 5), label=f"{one['method']}, {one['rate']:g}")
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="an RWKV .pth of 256 tokens")
    parser.add_argument("--train", type=Path, required=True, help=".jsonl, question and answer")
    parser.add_argument("--test", type=Path, required=True, help=".jsonl that is held out")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=384, help="of a row")
    parser.add_argument("--test_rows", type=int, default=16)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    best = []
    print("| trained | rate | parameters | last steps | held out |\n|---|---|---|---|---|")
    print(f"| nothing | | 0 | | {held_out_loss(given, load_model(given.model)):.3f} |")
    for method, (_, rates) in GRID.items():
        found = [run(given, method, rate) for rate in rates]
        best.append(min(found, key=lambda one: one["last"]))
        for one in found:
            cells = f"{one['rate']:g} | {one['trained']:,} | {one['last']:.3f}"
            print(f"| {method} | {cells} | {one['held_out']:.3f} |")
    draw(best, given.out / "states.png")


if __name__ == "__main__":
    main()
