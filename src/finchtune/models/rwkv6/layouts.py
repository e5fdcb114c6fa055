"""RWKV-6 in the forms of other software."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.models.layouts import (
    RESCALE,
    Entry,
    Layout,
    Naming,
    Told,
    fla_entries,
    flat,
    norms,
    reshaped,
    swapped,
)
from finchtune.models.rwkv6 import fla
from finchtune.models.rwkv6.config import ModelConfig

LOW_RANK = re.compile(r"time_(maa|mix|decay)_w[12]$")


def web_rwkv_entries(told: Told) -> list[Entry]:
    """Source: cryscan/web-rwkv, assets/scripts/convert_safetensors.py and src/runtime/loader.rs."""
    found = []
    for ours in told.names:
        theirs = ours.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")
        found.append(swapped(theirs, ours) if LOW_RANK.search(ours) else Entry(theirs, (ours,)))
    return found


def rwkv_cpp_entries(told: Told) -> list[Entry]:
    """Source: RWKV/rwkv.cpp, docs/FILE_FORMAT.md and python/convert_pytorch_to_ggml.py."""
    found = []
    for name in told.names:
        part = name.rpartition(".")[2]
        if LOW_RANK.search(name):
            found.append(swapped(name, name))
        elif part == "time_decay":
            make, split = lambda t: t.view(-1, told.head_size, 1), lambda t: t.reshape(1, 1, -1)
            found.append(reshaped(name, name, make, split))
        elif part == "time_faaaa":
            found.append(reshaped(name, name, lambda t: t.unsqueeze(-1), lambda t: t.squeeze(-1)))
        else:
            found.append(flat(name, name) if part.startswith("time_maa_") else Entry(name, (name,)))
    return found


def gguf_entries(told: Told) -> list[Entry]:
    """As llama.cpp's own converter (convert_hf_to_gguf.py, Rwkv6Model) makes them."""
    found = [Entry("token_embd.weight", ("emb.weight",)), Entry("output.weight", ("head.weight",))]
    found += norms({"token_embd_norm": "blocks.0.ln0", "output_norm": "ln_out"})
    for layer in range(told.n_layer):
        found += gguf_layer(layer, 2.0 ** (layer // told.rescale) if told.rescale else 1.0)
    return found


def gguf_layer(layer: int, divisor: float) -> list[Entry]:
    """The tensors of one layer; its outputs are stored divided by a power of two."""
    a, f, b = f"blocks.{layer}.att", f"blocks.{layer}.ffn", f"blk.{layer}"
    maa = tuple(f"{a}.time_maa_{part}" for part in "wkvrg")
    own = f"blocks.{layer}"
    found = [
        swapped(f"{b}.time_mix_w1.weight", f"{a}.time_maa_w1"),
        swapped(f"{b}.time_mix_w2.weight", f"{a}.time_maa_w2"),
        flat(f"{b}.time_mix_lerp_x.weight", f"{a}.time_maa_x"),
        Entry(f"{b}.time_mix_lerp_fused.weight", maa, fused, apart),
        Entry(f"{b}.time_mix_first.weight", (f"{a}.time_faaaa",)),
        flat(f"{b}.time_mix_decay.weight", f"{a}.time_decay"),
        swapped(f"{b}.time_mix_decay_w1.weight", f"{a}.time_decay_w1"),
        swapped(f"{b}.time_mix_decay_w2.weight", f"{a}.time_decay_w2"),
        *norms({f"{b}.attn_norm": f"{own}.ln1", f"{b}.attn_norm_2": f"{own}.ln2"}),
        *norms({f"{b}.time_mix_ln": f"{a}.ln_x"}),
    ]
    found += [Entry(f"{b}.time_mix_{n}.weight", (f"{a}.{n}.weight",))
              for n in ("receptance", "key", "value", "gate")]  # fmt: skip
    found += [flat(f"{b}.channel_mix_lerp_{part}.weight", f"{f}.time_maa_{part}") for part in "kr"]
    found += [Entry(f"{b}.channel_mix_{n}.weight", (f"{f}.{n}.weight",))
              for n in ("key", "receptance")]  # fmt: skip
    for theirs, ours in (("time_mix_output", f"{a}.output"), ("channel_mix_value", f"{f}.value")):
        found.append(
            reshaped(
                f"{b}.{theirs}.weight",
                f"{ours}.weight",
                lambda t: t / divisor if divisor != 1 else t,
                lambda t: t * divisor if divisor != 1 else t,
            )
        )
    return found


def fused(vectors: Sequence[Tensor]) -> Tensor:
    """Five vectors as one tensor (5, 1, 1, C)."""
    return torch.stack([vector.reshape(1, 1, -1) for vector in vectors])


def apart(theirs: Tensor) -> Sequence[Tensor]:
    """The inverse of `fused`."""
    return theirs.view(5, 1, 1, -1).unbind()


def gguf_told(sizes: ModelConfig) -> dict[str, Any]:
    """The sizes that llama.cpp's loader reads (src/models/rwkv6.cpp), beside every model's."""
    return {
        "rescale_every_n_layers": RESCALE,
        "wkv.head_size": sizes.head_size,
        "time_mix_extra_dim": sizes.dim_mix_lora,
        "time_decay_extra_dim": sizes.dim_decay_lora,
    }


def to_hf(name: str) -> str:
    """The name of a module or tensor in the layout of the Hugging Face conversions.

    That of BBuf/RWKV-World-HF-Tokenizer (scripts/convert_rwkv6_checkpoint_to_hf.py), by which the
    RWKV/v6-Finch models were made: blocks.0.att.key -> rwkv.blocks.0.attention.key.
    """
    if re.match(r"head(\.|$)", name):
        return name
    name = re.sub(r"^emb(?=\.|$)", "embeddings", name)
    name = re.sub(r"^(blocks\.0)\.ln0(?=\.|$)", r"\1.pre_ln", name)
    name = re.sub(r"^(blocks\.\d+)\.att(?=\.|$)", r"\1.attention", name)
    return "rwkv." + re.sub(r"^(blocks\.\d+)\.ffn(?=\.|$)", r"\1.feed_forward", name)


def from_hf(name: str) -> str:
    """The inverse of `to_hf`. Raises UserError for a name of another layout."""
    if re.match(r"head(\.|$)", name):
        return name
    if not name.startswith("rwkv."):
        raise CheckpointError(
            f"{name} is no name of Hugging Face's RWKV-6 layout; drop `layer_names`"
        )
    name = re.sub(r"^embeddings(?=\.|$)", "emb", name.removeprefix("rwkv."))
    name = re.sub(r"^(blocks\.0)\.pre_ln(?=\.|$)", r"\1.ln0", name)
    name = re.sub(r"^(blocks\.\d+)\.attention(?=\.|$)", r"\1.att", name)
    return re.sub(r"^(blocks\.\d+)\.feed_forward(?=\.|$)", r"\1.ffn", name)


CODE = "RWKV/v6-Finch-1B6-HF--"
"""The released repository whose code a folder is run by."""


def hf_told(sizes: ModelConfig) -> dict[str, Any]:
    """config.json of the remote code (BBuf/RWKV-World-HF-Tokenizer, rwkv6_model/)."""
    return {
        "auto_map": {
            "AutoConfig": f"{CODE}configuration_rwkv6.Rwkv6Config",
            "AutoModelForCausalLM": f"{CODE}modeling_rwkv6.Rwkv6ForCausalLM",
        },
        "attention_hidden_size": sizes.n_embd,
        "head_size": sizes.head_size,
        "head_size_divisor": 8,
        "hidden_size": sizes.n_embd,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-5,
        "num_hidden_layers": sizes.n_layer,
        "rescale_every": RESCALE,
        "vocab_size": sizes.vocab_size,
    }


def hf_check(sizes: ModelConfig) -> None:
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


LAYOUTS = {
    "fla": Layout(
        partial(fla_entries, of_layer=fla.layer_entries),
        name="RWKV6ForCausalLM",
        mark="num_heads",
        told=fla.told,
    ),
    "gguf": Layout(
        gguf_entries,
        name="rwkv6",
        told=gguf_told,
        precise=r"norm|lerp|time_mix_(ln|first|w1|w2|decay)",
    ),
    "hf": Layout(
        lambda told: [Entry(to_hf(name), (name,)) for name in told.names],
        name="Rwkv6ForCausalLM",
        mark="head_size",
        told=hf_told,
        check=hf_check,
        naming=Naming(to_hf, from_hf),
    ),
    "rwkv.cpp": Layout(
        rwkv_cpp_entries,
        recognise=lambda shapes: "blocks.0.att.time_faaaa" in shapes,
        precise=r"\.time_",
    ),
    "web-rwkv": Layout(
        web_rwkv_entries,
        recognise=lambda shapes: "blocks.0.att.time_mix_w1" in shapes,
    ),
}
