"""The loss curve as a picture."""

from pathlib import Path

from finchtune.errors import printable
from finchtune.report.series import RunLog, last_mean, method_of, name_of, read_run, smoothed

LOG_FROM = 8.0  # largest over smallest loss from which a logarithmic axis shows more


def plot_loss(folder: str | Path, picture: str | Path) -> Path:
    """Draw the loss of every step of a run, and its running mean."""
    from matplotlib.figure import Figure  # slow to import, pyplot more so

    run = read_run(folder)
    points = run.points("loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for curve, label, opacity in ((points, "each step", 0.4), (smoothed(points), "mean", 1.0)):
        steps, losses = [x for x, _ in curve], [y for _, y in curve]
        axes.plot(steps, losses, color="tab:blue", linewidth=1, alpha=opacity, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title_of(run))
    if points and 0 < min(run.values("loss")) < max(run.values("loss")) / LOG_FROM:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)
    return Path(picture)


def title_of(run: RunLog) -> str:
    """Method, model and final loss, as far as the run tells them; text, not mathematics."""
    losses = run.values("loss")
    final = f"final loss {last_mean(losses):.4f}" if losses else ""
    parts = (method_of(run.config), name_of(run.config, "load_model"), final)
    return printable(", ".join(filter(None, parts))).replace("$", r"\$")
