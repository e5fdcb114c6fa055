"""Documents -> the micro batches of each step."""

from finchtune.data.batch import Batch
from finchtune.data.load import Data, load_data
from finchtune.data.prefetch import prefetch
from finchtune.data.render import PROMPT

__all__ = ["PROMPT", "Batch", "Data", "load_data", "prefetch"]
