"""What a run looks like: `loss.png`, and `report.html` for one run or several side by side."""

from finchtune.report.page import write_report
from finchtune.report.picture import plot_loss
from finchtune.report.series import FACTS, running_mean

__all__ = ["FACTS", "plot_loss", "running_mean", "write_report"]
