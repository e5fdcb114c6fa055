"""Figure 1: norms of the first gradient under each method, over ranks (section 9.1 as well).

The L2 norm of the gradient of the mean loss per token, over all that a method trains, before any
step. "full" trains every parameter of the model; frozen_ft adds a zero matrix to each frozen weight
of the adapted linears; biglora is LoRA at one large rank (--biglora_r; above the width of a layer
its product cannot gain rank any more, only parameters). Each seed takes a batch and a random start
of its own; shown are the mean over the seeds and, in the JSON, every norm. --smoke takes two ranks,
one seed and short rows.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from finchtune import attach, load_model
from finchtune.data import Batch, load_data
from finchtune.errors import UserError, run_cli
from finchtune.files import write_json, write_text
from finchtune.tokenizer import load_tokenizer

RANKED = ("bone", "bat", "lora", "pissa")
FIXED = ("full", "frozen_ft", "biglora")
SMOKE = {"ranks": [2, 8], "biglora_r": 64, "seeds": [0], "micro_bsz": 2, "ctx_len": 64}


def main() -> None:
    given = parse()
    cases = [(method, r) for method in RANKED for r in given.ranks]
    cases += [(method, given.biglora_r if method == "biglora" else None) for method in FIXED]
    batches = {seed: first_batch(given, seed) for seed in given.seeds}
    rows = []
    for method, r in cases:
        found = [measure(given.model, method, r, seed, batches[seed]) for seed in given.seeds]
        norms = [norm for norm, _ in found]
        row = {"method": method, "r": r, "trained": found[0][1], "norms": norms}
        rows.append(row | {"mean": statistics.fmean(norms)})
        print(
            f"{method:10} r {r or '-':>5}  {row['trained']:>12,} trained  {rows[-1]['mean']:9.3f}"
        )
    text = table(rows, given.ranks)
    print(f"\n{text}")
    out = Path(given.output)
    about = "Smoke run: it shows that everything runs.\n\n" if given.smoke else ""
    write_text(out / "figure1.md", f"## Figure 1, norms of the first gradient\n\n{about}{text}\n")
    write_json(out / "figure1.json", {"arguments": vars(given), "rows": rows})
    draw(rows, out / "figure1.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="base weights")
    parser.add_argument("--data_file", required=True, help=".jsonl with the text")
    parser.add_argument("--sft_field", nargs="+", default=["question", "answer"])
    parser.add_argument("--output", required=True, help="folder of figure1.md, .json and .png")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--biglora_r", type=int, default=1024)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--micro_bsz", type=int, default=8, help="rows of the batch")
    parser.add_argument("--ctx_len", type=int, default=256)
    parser.add_argument("--smoke", action="store_true", help="the least that shows that it runs")
    given = parser.parse_args()
    if given.smoke:
        parser.set_defaults(**SMOKE)
        given = parser.parse_args()
    if min(given.ranks) < 1:
        raise UserError("--ranks must be at least 1")
    return given


def first_batch(given: argparse.Namespace, seed: int) -> Batch:
    """Windows of ctx_len tokens of the text, questions and answers alike."""
    vocab_size = load_model(given.model).config.vocab_size
    data = load_data(
        given.data_file,
        "sft",
        "get",
        given.ctx_len,
        sft_field=given.sft_field,
        tokenizer=load_tokenizer(None, vocab_size),
        vocab_size=vocab_size,
        seed=seed,
    )
    return data.rows(0, 0, 1, given.micro_bsz, 1)[0]


def measure(path: str, method: str, r: int | None, seed: int, batch: Batch) -> tuple[float, int]:
    """Norm of the first gradient, and the number of trained parameters."""
    torch.manual_seed(seed)
    model = load_model(path, dtype=torch.float32)
    if method == "full":
        model.requires_grad_(True)
    else:
        attach(model, method, **hyperparameters(method, r))
    loss = model.loss(batch.tokens, batch.labels)[0] / batch.labels.numel()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    return norm, sum(p.numel() for p in trained)


def hyperparameters(method: str, r: int | None) -> dict[str, Any]:
    """A method's settings at rank r; LoRA's scale is 1 at every rank."""
    if r is None:
        return {}
    return {"r": r, "alpha": r} if method in ("lora", "biglora") else {"r": r}


def table(rows: list[dict[str, Any]], ranks: list[int]) -> str:
    """Markdown: methods by rank; one figure in the last column for those without."""
    lines = ["| | " + " | ".join(f"r {r}" for r in ranks) + " | any r |"]
    lines.append("|---" * (len(ranks) + 2) + "|")
    for method in (*RANKED, *FIXED):
        means = {row["r"]: f"{row['mean']:.2f}" for row in rows if row["method"] == method}
        fixed = next(iter(means.values())) if method in FIXED else ""
        cells = [means.get(r, "") if method in RANKED else "" for r in ranks]
        lines.append(f"| {method} | " + " | ".join([*cells, fixed]) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Norms over ranks, both axes logarithmic; methods without a rank are level lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), constrained_layout=True)
    for method in RANKED:
        points = [(row["r"], row["mean"]) for row in rows if row["method"] == method]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
    for method, style in zip(FIXED, ("-", "--", ":"), strict=True):
        (row,) = (row for row in rows if row["method"] == method)
        label = f"{method}, r {row['r']}" if row["r"] else method
        axes.axhline(row["mean"], color="black", linestyle=style, linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="norm of the first gradient")
    ranks = sorted({row["r"] for row in rows if row["method"] in RANKED})
    axes.set_xticks(ranks, [str(r) for r in ranks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    run_cli(main)
