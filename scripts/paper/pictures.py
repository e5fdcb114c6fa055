"""Loss curves of a study's cells."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from cells import Cell
from study import Key, Study

from finchtune.report import running_mean

FIRST = 100  # steps that are shown closer, as in the paper
WINDOW = 10


def losses(cell: Cell) -> list[float]:
    """The loss of every step."""
    lines = (cell.folder / "train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def loss_curves(study: Study, chosen: Mapping[Key, Sequence[Cell]], picture: Path) -> None:
    """The first course's curves, the mean of the seeds smoothed: all steps, and the first 100."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = next(iter(study.rates))
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for (line, course), cells in chosen.items():
        if course != first:
            continue
        mean = [statistics.fmean(step) for step in zip(*map(losses, cells), strict=False)]
        curve = running_mean(mean, WINDOW)
        for axes, shown in zip(panels, (curve, curve[:FIRST]), strict=True):
            axes.plot(range(1, len(shown) + 1), shown, linewidth=1.2, label=line.label)
    for axes in panels:
        axes.set(xlabel="step", ylabel=f"loss (nats per token), mean of {WINDOW} steps")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
