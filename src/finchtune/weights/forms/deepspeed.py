"""Folders of official names: what DeepSpeed's zero_to_fp32.py writes, and DeepSpeed's own.

Of DeepSpeed's own checkpoints those of ZeRO stages 1 and 2 hold the whole model in one file. Only
plain tensors are read; a file that needs code to be run is refused.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from finchtune.errors import CheckpointError, UserError
from finchtune.weights.forms.base import Form
from finchtune.weights.forms.folders import CONFIG, read_folder, weight_files
from finchtune.weights.tensors import read_tensors

STATES = "mp_rank_00_model_states.pt"
LATEST = "latest"
CONVERT = "run `python zero_to_fp32.py . plain` in it and give the folder that this makes"


def states_file(path: Path) -> Path:
    """Where the model lies in a folder of DeepSpeed, or in its newest checkpoint."""
    latest = path / LATEST
    tag = latest.read_text().strip() if latest.is_file() else ""
    inner = path / tag if tag and Path(tag).name == tag else path
    return inner / STATES


def recognise(path: Path) -> bool:
    """A folder with weights but without a configuration, or one of DeepSpeed's."""
    if not path.is_dir():
        return False
    return is_sharded(path) or states_file(path).is_file() or (
        not (path / CONFIG).exists() and bool(weight_files(path))
    )  # fmt: skip


def is_sharded(path: Path) -> bool:
    """Whether it is a checkpoint of ZeRO stage 3, where no file holds a whole tensor."""
    return any(states_file(path).parent.glob("zero_pp_rank_*_model_states.pt"))


def read(path: Path) -> Mapping[str, Tensor]:
    """A folder's tensors, memory-mapped."""
    if is_sharded(path):
        raise CheckpointError(f"{path} is a checkpoint of ZeRO stage 3, in shards; {CONVERT}")
    if not states_file(path).is_file():
        return read_folder(path)
    try:
        return read_tensors(states_file(path))
    except UserError as error:
        held = "a DeepSpeed checkpoint that holds more than tensors"
        raise CheckpointError(f"{path}: {held}; {CONVERT}") from error


FORM = Form(
    name="deepspeed",
    title="a folder of DeepSpeed or of zero_to_fp32.py",
    dtypes=(),
    recognise=recognise,
    read=read,
)
