"""The loss curve as a picture."""

from pathlib import Path

from finchtune.report.series import read_run, smoothed


def plot_loss(folder: str | Path, picture: str | Path) -> Path:
    """Draw the loss of every step of a run, and its running mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = read_run(folder).points("loss")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
    for curve, label, opacity in ((points, "each step", 0.4), (smoothed(points), "mean", 1.0)):
        steps, losses = [x for x, _ in curve], [y for _, y in curve]
        axes.plot(steps, losses, color="tab:blue", linewidth=1, alpha=opacity, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return Path(picture)
