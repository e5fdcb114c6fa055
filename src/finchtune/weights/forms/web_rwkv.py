"""web-rwkv and Ai00: `.st`, safetensors in fp16 with names and layouts of their own."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.models import INITIAL_STATE
from finchtune.weights.forms.base import (
    DTYPES,
    Form,
    FoundAdapter,
    LowRank,
    Settings,
    converted,
    from_form,
    n_layer_of,
    recognised,
    to_form,
)
from finchtune.weights.forms.safetensors import (
    header_of,
    is_safetensors,
    read_safetensors,
    shapes_of,
    write_safetensors,
)
from finchtune.weights.lazy import mapped

NAME = "web-rwkv"
FEWEST_LAYERS = 4  # below it the runtime does not load a model
A_KEY, B_KEY = ".lora.0", ".lora.1"


def recognise(path: Path) -> bool:
    """Safetensors with a generation's names and layouts in this form."""
    return is_safetensors(path) and recognised(NAME, shapes_of(path)) is not None


def read(path: Path) -> Mapping[str, Tensor]:
    """A model's tensors, memory-mapped."""
    theirs, generation = read_safetensors(path), recognised(NAME, shapes_of(path))
    assert generation is not None
    return from_form(theirs, NAME, generation, n_layer_of(theirs, "blocks."), path)


def write(weights: Mapping[str, Tensor], path: Path, settings: Settings) -> str:
    """Write a model; returns the file's sha256."""
    n_layer = n_layer_of(weights, "blocks.")
    if n_layer < FEWEST_LAYERS:
        raise CheckpointError(
            f"web-rwkv loads no model of fewer than {FEWEST_LAYERS} layers; this one has {n_layer}"
        )
    theirs = to_form(weights, NAME)
    dtype = DTYPES[settings.dtype]
    return write_safetensors(mapped(theirs, lambda n, t: converted(n, t, dtype)), path)


def recognise_adapter(path: Path) -> bool:
    """Safetensors of nothing but LoRA's two factors, or of nothing but states."""
    if not is_safetensors(path):
        return False
    names = header_of(path).keys() - {"__metadata__"}
    kinds = ((A_KEY, B_KEY), INITIAL_STATE)
    return bool(names) and any(all(name.endswith(kind) for name in names) for kind in kinds)


def read_adapter(path: Path) -> FoundAdapter:
    """An adapter's factors. The file need not tell alpha; without it alpha is the rank.

    Of a file of states these, and no settings.
    """
    found = read_safetensors(path)
    if all(name.endswith(INITIAL_STATE) for name in found):
        return FoundAdapter({n: t.mT.float().contiguous() for n, t in found.items()}, {})
    layers = {}
    for name, tensor in found.items():
        layer, B = name.removesuffix(A_KEY), f"{name.removesuffix(A_KEY)}{B_KEY}"
        if name.endswith(A_KEY):
            if B not in found:
                raise CheckpointError(f"{path}: {B} is missing")
            layers[layer] = (tensor.T.contiguous(), found[B])
    if not layers or len(found) != 2 * len(layers):
        raise CheckpointError(f"{path} is no whole LoRA of web-rwkv")
    rank = len(next(iter(layers.values()))[0])
    alpha = header_of(path).get("__metadata__", {}).get("alpha", rank)
    try:
        return LowRank(layers, float(alpha)).found()
    except ValueError as error:
        raise CheckpointError(f"{path}: alpha is {alpha!r:.40}, not a number") from error


def write_adapter(adapter: LowRank, path: Path, settings: Settings) -> str:
    """Write an adapter; the runtime is told alpha when it loads the file."""
    dtype = DTYPES[settings.dtype]
    tensors = {}
    for layer, (A, B) in adapter.layers.items():
        tensors[f"{layer}{A_KEY}"] = converted(f"{layer}{A_KEY}", A, dtype).T.contiguous()
        tensors[f"{layer}{B_KEY}"] = converted(f"{layer}{B_KEY}", B, dtype).contiguous()
    return write_safetensors(tensors, path, {"alpha": repr(adapter.alpha)})


def write_states(states: Mapping[str, Tensor], path: Path, settings: Settings) -> str:
    """Write initial states as (H, N key, N value), as the runtime's own converter does.

    assets/scripts/convert_safetensors.py and read_state in src/runtime/v6.rs of web-rwkv.
    """
    dtype = DTYPES[settings.dtype]
    theirs = {name: converted(name, tensor, dtype).mT for name, tensor in states.items()}
    return write_safetensors(theirs, path)


FORM = Form(
    name=NAME,
    title="web-rwkv's .st (Ai00)",
    suffix=".st",
    dtypes=("fp16",),
    recognise=recognise,
    read=read,
    write=write,
    recognise_adapter=recognise_adapter,
    read_adapter=read_adapter,
    write_adapter=write_adapter,
    write_states=write_states,
)
