"""Files of initial states: what every block begins a document from, `blocks.N.att.time_state`.

The ecosystem's form: (H, N value, N key) for each block. RWKV-PEFT writes it, the `rwkv` package
and RWKV-Runner read it, alone or merged into a model's file; web-rwkv has it as its own .st.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.models import INITIAL_STATE, LanguageModel, State, meta_model
from finchtune.weights.adapter_files import foreign_adapter
from finchtune.weights.stated import adapter_tensors
from finchtune.weights.tensors import check_finite, check_shapes, read_tensors


def read_states(path: str | Path, model: LanguageModel) -> dict[str, Tensor]:
    """The states in a file, by the names that they have in a model of `model`'s sizes.

    A merged model's file will do, its other tensors are passed over. Raises UserError for a file
    without states, and for states of another model.
    """
    named = {re.sub(r"^model\.", "", name): t for name, t in tensors_in(path).items()}
    states = {name: tensor for name, tensor in named.items() if name.endswith(INITIAL_STATE)}
    if not states:
        raise CheckpointError(f"{path}: holds no initial states (blocks.0{INITIAL_STATE}, ...)")
    blank = meta_model(model.config)
    blank.add_initial_state()
    expected = {name: tuple(p.shape) for name, p in blank.initial_states().items()}
    check_shapes({name: tuple(t.shape) for name, t in states.items()}, expected, path)
    check_finite(states, path)
    return states


def tensors_in(path: str | Path) -> dict[str, Tensor]:
    """What a .pth, or a file of other software's states or adapters, holds."""
    foreign = foreign_adapter(path)
    return foreign.tensors if foreign else read_tensors(path)


def holds_states(path: str | Path) -> bool:
    """Whether a file holds initial states, alone or in a model, and no adapter."""
    tensors = tensors_in(path)
    return any(n.endswith(INITIAL_STATE) for n in tensors) and not adapter_tensors(tensors)


@torch.no_grad()
def set_states(model: LanguageModel, path: str | Path) -> None:
    """Have a model begin documents from the states in a file. Raises UserError as `read_states`."""
    states = read_states(path, model)
    model.add_initial_state()
    for name, parameter in model.initial_states().items():
        parameter.copy_(states[name])


def load_state(path: str | Path, model: LanguageModel) -> State:
    """The state of one sequence that begins from those in a file: several share one model so.

    Raises UserError as `read_states` does.
    """
    return model.state_from(read_states(path, model))
