"""Documents -> the micro batches of each step.

The public names are imported when first used: preparing data needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finchtune.data.batch import Batch
    from finchtune.data.dataset import Data
    from finchtune.data.load import load_data

_HOMES = {
    "Batch": "batch",
    "Data": "dataset",
    "load_data": "load",
}
__all__ = ["Batch", "Data", "load_data"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finchtune.data' has no attribute {name!r}")
    return getattr(import_module(f"finchtune.data.{_HOMES[name]}"), name)
