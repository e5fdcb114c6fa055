"""What each form of a frozen base costs in precision: logits, gradients, and the loss of training.

    python scripts/bench/quant_error.py --model tiny6.pth --data gsm8k_train.jsonl

Every form is held against fp32 weights and products. "logits" and "gradients" are relative errors
(norm of the difference over the norm) on the first batch, the gradients those of all adapter
tensors together; "last" is the mean loss of the last steps of a training, and "more" what it is
above that in fp32. Steps are AdamW in fp32 on the adapter, forward and backward in --precision. On
a CPU fp8_compute rounds as a GPU does and sums up in fp32.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finchtune.adapters import attach
from finchtune.config.flags import QUANT
from finchtune.errors import UserError, run_cli
from finchtune.models import LanguageModel
from finchtune.weights.base import load_model

METHODS = {"bone": {"r": 8}, "bat": {"r": 8}, "lora": {"r": 8}, "pissa": {"r": 8}}
LAST = 5


@dataclass(frozen=True)
class Found:
    """What one form gave."""

    logits: Tensor
    gradient: Tensor
    losses: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a .jsonl of questions and answers")
    parser.add_argument("--forms", nargs="+", default=list(QUANT), choices=QUANT)
    parser.add_argument("--method", default="bone", choices=METHODS)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--encoding", default="utf-16-le", help="of the bytes that are tokens")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=4, help="in a step")
    parser.add_argument("--ctx_len", type=int, default=256)
    given = parser.parse_args()
    if given.steps < LAST:
        raise UserError(f"--steps must be at least {LAST}")
    rows = read_rows(given)
    truth = trained(given, "none", torch.float32, rows)
    dtype = torch.float32 if given.precision == "fp32" else torch.bfloat16
    print("| form | logits | gradients | first | last | more |\n|---|---|---|---|---|---|")
    print(line("fp32", truth, truth), flush=True)
    for form in given.forms:
        print(line(form, trained(given, form, dtype, rows), truth), flush=True)


def read_rows(given: argparse.Namespace) -> Tensor:
    """(steps, rows, ctx_len + 1) bytes of the data, one record after another."""
    size = given.steps * given.rows * (given.ctx_len + 1)
    text = "".join(texts(given.data)).encode(given.encoding)[:size]
    if len(text) < size:
        raise UserError(f"--data {given.data} has fewer than the {size:,} bytes of --steps")
    return torch.tensor(list(text)).view(given.steps, given.rows, -1)


def texts(path: str) -> Iterator[str]:
    for record in Path(path).read_text().splitlines():
        found = json.loads(record)
        yield f"{found['question']}\n{found['answer']}\n\n"


def trained(given: argparse.Namespace, form: str, dtype: torch.dtype, rows: Tensor) -> Found:
    """Logits and gradients of the first batch, and the loss of every step."""
    torch.manual_seed(0)
    model = load_model(given.model, torch.float32)
    quant = None if form == "none" else form
    attach(model, given.method, quant=quant, **METHODS[given.method])
    model.to(dtype)
    own = [p.requires_grad_() for p in model.parameters() if p.requires_grad]
    master = [p.detach().float() for p in own]
    optimizer = torch.optim.AdamW(master, given.lr, weight_decay=0)
    with torch.no_grad():
        logits = model(rows[0, :, :-1])[0].float()
    losses, first = [], torch.empty(0)
    for batch in rows:
        losses.append(gradients(model, batch, master, own))
        if not len(first):
            first = torch.cat([p.grad.flatten() for p in master if p.grad is not None])
        optimizer.step()
        with torch.no_grad():
            for p, precise in zip(own, master, strict=True):
                p.copy_(precise)
    return Found(logits, first, losses)


def gradients(
    model: LanguageModel, batch: Tensor, master: list[Tensor], own: list[Tensor]
) -> float:
    """The mean loss of a batch; its gradients go to `master`."""
    labels = batch[:, 1:]
    loss = model.loss(batch[:, :-1], labels)[0] / labels.numel()
    for precise, dp in zip(master, torch.autograd.grad(loss, own), strict=True):
        precise.grad = dp.float()
    return loss.item()


def line(form: str, found: Found, truth: Found) -> str:
    def error(name: str) -> str:
        mine, true = getattr(found, name), getattr(truth, name)
        return f"{((mine - true).norm() / true.norm()).item():.2%}"

    def mean(losses: list[float]) -> float:
        return sum(losses[-LAST:]) / LAST

    last = mean(found.losses)
    return (
        f"| {form} | {error('logits')} | {error('gradient')} | {found.losses[0]:.4f} | "
        f"{last:.4f} | {last - mean(truth.losses):+.4f} |"
    )


if __name__ == "__main__":
    run_cli(main)
