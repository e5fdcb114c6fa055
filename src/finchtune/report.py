"""Pictures of a run."""

from pathlib import Path

from finchtune.metrics import read_metrics


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to window - 1 before it."""
    means = []
    for i in range(len(values)):
        part = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(part) / len(part))
    return means


def plot_loss(metrics: str | Path, picture: str | Path) -> Path:
    """Draw the loss of every step, and its running mean, from a metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.plot(steps, losses, linewidth=0.8, alpha=0.4, color="tab:blue", label="each step")
    axes.plot(
        steps, running_mean(losses, max(1, len(losses) // 20)), color="tab:blue", label="mean"
    )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return Path(picture)
