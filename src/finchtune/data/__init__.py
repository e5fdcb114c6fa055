"""Documents -> the micro batches of each step."""

from finchtune.data.load import Batch, Data, load_data
from finchtune.data.render import PROMPT

__all__ = ["PROMPT", "Batch", "Data", "load_data"]
