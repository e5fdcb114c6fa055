"""Hugging Face folders in the layout of RWKV-6's remote code (Rwkv6ForCausalLM).

Source: BBuf/RWKV-World-HF-Tokenizer, rwkv6_model/ and scripts/convert_rwkv6_checkpoint_to_hf.py,
by which the RWKV/v6-Finch models were made.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.models.rwkv6 import ModelConfig
from finchtune.weights.forms.base import (
    DTYPES,
    Entry,
    Form,
    Settings,
    from_form,
    n_layer_of,
    official_names,
    to_form,
)
from finchtune.weights.forms.folders import is_rwkv6_folder, read_folder, write_folder
from finchtune.weights.lazy import layout_of
from finchtune.weights.peft_form import to_hf_rwkv6

ARCHITECTURE = "Rwkv6ForCausalLM"
CODE = "RWKV/v6-Finch-1B6-HF--"
"""The released repository whose code the folder is run by."""


def entries(n_layer: int) -> list[Entry]:
    """Every tensor of this form."""
    return [Entry(to_hf_rwkv6(name), (name,)) for name in official_names(n_layer)]


def recognise(path: Path) -> bool:
    """By config.json."""
    return is_rwkv6_folder(path, ARCHITECTURE, "head_size")


def read(path: Path) -> Mapping[str, Tensor]:
    """A folder's tensors, memory-mapped."""
    theirs = read_folder(path)
    return from_form(theirs, entries(n_layer_of(theirs, "rwkv.blocks.")), path)


def write(weights: Mapping[str, Tensor], path: Path, settings: Settings) -> None:
    """Write a folder. Raises UserError for sizes that the remote code cannot have."""
    sizes = ModelConfig.from_weights(layout_of(weights))
    check_sizes(sizes)
    config = {
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": f"{CODE}configuration_rwkv6.Rwkv6Config",
            "AutoModelForCausalLM": f"{CODE}modeling_rwkv6.Rwkv6ForCausalLM",
        },
        "model_type": "rwkv6",
        "attention_hidden_size": sizes.n_embd,
        "head_size": sizes.head_size,
        "head_size_divisor": 8,
        "hidden_size": sizes.n_embd,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-5,
        "num_hidden_layers": sizes.n_layer,
        "rescale_every": 6,
        "vocab_size": sizes.vocab_size,
    }
    write_folder(to_form(weights, entries(sizes.n_layer)), path, config, settings)


def check_sizes(sizes: ModelConfig) -> None:
    """The remote code derives three sizes from the width, whatever the configuration says."""
    C = sizes.n_embd
    wide = C == 4096
    derived = {
        "dim_ffn": int(C * 3.5) // 32 * 32,
        "dim_mix_lora": 64 if wide else 32,
        "dim_decay_lora": 128 if wide else 64,
    }
    for name, value in derived.items():
        if getattr(sizes, name) != value:
            raise CheckpointError(
                f"Hugging Face's RWKV-6 code takes {name} {value} for n_embd {C}, and the model "
                f"has {getattr(sizes, name)}; export it to fla or another form"
            )


FORM = Form(
    name="hf",
    title="a Hugging Face folder (RWKV-6's remote code)",
    dtypes=tuple(DTYPES),
    recognise=recognise,
    read=read,
    write=write,
)
