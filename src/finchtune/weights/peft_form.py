"""Adapters in the form of Hugging Face's peft: adapter_config.json and adapter_model.safetensors.

Checked against peft 0.21.2, where a layer's tensors are called base_model.model.LAYER.TENSOR. Bone,
Bat-col and general DiSHA are its MiSS with init_weights true, "bat" and "mini"; it has no Bat-row.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finchtune.adapters import get_method, hyperparameters_of
from finchtune.errors import CheckpointError
from finchtune.files import atomic_folder, read_object, write_json
from finchtune.models import generations
from finchtune.models.layouts import Naming

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "init_magnitude": "lora_magnitude_vector",
    "bone": "miss_block",
}
RESIDUAL = ("pissa", "olora", "lora_ga")
CHANGED_BASE = (*RESIDUAL, "loftq", "corda")  # starts for which peft itself changes the base
# Settings of peft that do not change what a saved adapter computes. All others but those read
# here must be off.
HARMLESS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "target_modules", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "megatron_core", "qalora_group_size", "eva_config"),
}
READ = {
    "LORA": {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"},
    "MISS": {"r", "mini_r", "miss_dropout", "init_weights"},
}

TYPES = {
    **dict.fromkeys(("r", "mini_r"), (int,)),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "miss_dropout"), (int, float)),
    **dict.fromkeys(("use_rslora", "use_dora"), (bool,)),
    **dict.fromkeys(("init_weights", "init_lora_weights"), (bool, str)),
}
"""Of the settings that are read."""


class PeftAdapter(NamedTuple):
    """An adapter as finchtune has it: file key -> tensor, and the method with its settings."""

    tensors: dict[str, Tensor]
    spec: dict[str, Any]


def write_peft(adapter: PeftAdapter, folder: str | Path) -> None:
    """Write an adapter as a folder that peft's `PeftModel.from_pretrained` loads; atomically.

    PiSSA, OLoRA and LoRA-GA become the LoRA of twice the rank that adds B A - B0 A0, since peft
    would otherwise need the changed base. Raises UserError for what peft has no form for.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; choose another name")
    with atomic_folder(folder) as temporary:
        fill_folder(adapter, temporary)


def fill_folder(adapter: PeftAdapter, folder: Path) -> None:
    """Write an adapter's files into an empty folder."""
    from safetensors.torch import save_file

    if adapter.spec["method"] in RESIDUAL:
        adapter = as_plain_lora(adapter)
    if adapter.spec["method"] == "dora":
        adapter = with_whole_magnitudes(adapter)
    config = peft_config(adapter.spec)
    tensors, layers = {}, set()
    for key, tensor in adapter.tensors.items():
        layer, _, own = key.rpartition(".")
        suffix = "miss_block" if own == "shard" else SUFFIXES.get(own)
        if suffix is None:
            raise CheckpointError(
                f"{key} is a trained tensor of the model itself, for which peft's form has no "
                "place; merge the adapter instead"
            )
        layers.add(layer)
        # peft's mini form has the two sides of the matrix the other way round.
        tensors[f"{PREFIX}{layer}.{suffix}"] = (tensor.T if own == "shard" else tensor).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config | {"target_modules": sorted(layers)})


def as_plain_lora(adapter: PeftAdapter) -> PeftAdapter:
    """scale (B A - B0 A0) as one product: A over A0 (2r, k), and B beside -B0 (d, 2r)."""
    tensors, spec = adapter
    method, r = get_method(spec["method"]), spec["r"]
    own = {k: v for k, v in spec.items() if k in hyperparameters_of(method)}
    with torch.device("meta"):
        scale = method(2 * r, 2 * r, **own).scale
    plain = {}
    for key, A in tensors.items():
        layer, _, kind = key.rpartition(".")
        if kind == "lora_A":
            plain[key] = torch.cat([A, tensors[f"{layer}.init_lora_A"]])
            B = (tensors[f"{layer}.lora_B"], -tensors[f"{layer}.init_lora_B"])
            plain[f"{layer}.lora_B"] = torch.cat(B, dim=1)
        elif kind not in ("lora_B", "init_lora_A", "init_lora_B"):
            plain[key] = A
    return PeftAdapter(plain, {"method": "lora", "r": 2 * r, "alpha": 2 * r * scale})


def with_whole_magnitudes(adapter: PeftAdapter) -> PeftAdapter:
    """DoRA's magnitudes as one tensor, in the place of their start; the changes are left out."""
    changed = {
        key: tensor + adapter.tensors[key.replace("init_magnitude", "magnitude_change")]
        for key, tensor in adapter.tensors.items()
        if key.endswith(".init_magnitude")
    }
    kept = {k: t for k, t in adapter.tensors.items() if not k.endswith(".magnitude_change")}
    return adapter._replace(tensors=kept | changed)


def peft_config(spec: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json of an adapter, but for its target modules."""
    method = spec["method"]
    common = {"bias": "none", "inference_mode": True, "task_type": None}
    if method in ("lora", "dora"):
        return common | {
            "peft_type": "LORA",
            "r": spec["r"],
            "lora_alpha": spec["alpha"],
            "lora_dropout": spec.get("dropout", 0.0),
            "use_rslora": spec.get("rslora", False),
            "use_dora": method == "dora",
            "init_lora_weights": True,
        }
    if method == "bone" or (method == "bat" and spec["mode"] == "col"):
        kind = True if method == "bone" else "bat"
        return common | {"peft_type": "MISS", "r": spec["r"], "init_weights": kind}
    if method == "disha":
        sizes = {"r": spec["r2"], "mini_r": spec["r1"]}
        return common | {"peft_type": "MISS", "init_weights": "mini", **sizes}
    mode = " in row mode" if method == "bat" else ""
    raise CheckpointError(f"peft has no form for {method}{mode}; merge the adapter instead")


def read_peft(folder: str | Path) -> PeftAdapter:
    """The adapter in a folder that peft saved: LoRA, DoRA or MiSS.

    Raises UserError for other methods, and for settings whose effect would be lost.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = read_object(folder / CONFIG)
    spec = spec_of(config, folder / CONFIG)
    try:
        found = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be read: {error}") from error
    own_names = {suffix: own for own, suffix in SUFFIXES.items()}
    tensors = {}
    for key, tensor in found.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(own_names)})", key)
        if not match:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} is no tensor of a {spec['method']} adapter"
            )
        layer, own = match[1], own_names[match[2]]
        if spec["method"] == "disha":
            own, tensor = "shard", tensor.T.contiguous()
        tensors[f"{layer}.{own}"] = tensor
        if own == "init_magnitude":
            tensors[f"{layer}.magnitude_change"] = torch.zeros_like(tensor)
    return PeftAdapter(tensors, spec)


def spec_of(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Method and hyperparameters that an adapter_config.json stands for."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READ:
        raise CheckpointError(
            f"{path}: peft_type {kind!s:.40} is not known here; LORA and MISS are"
        )
    for key in ("r", "lora_alpha") if kind == "LORA" else ("r",):
        if key not in config:
            raise CheckpointError(f"{path}: {key} is missing")
    for key, types in TYPES.items():
        if key in config and type(config[key]) not in types:
            raise CheckpointError(f"{path}: {key} {config[key]!r:.40} makes no sense")
    for key, value in config.items():
        if key not in HARMLESS | READ[kind] and value and value != "none":
            raise CheckpointError(f"{path}: {key} {value!r} is not available here")
    if kind == "MISS":
        return miss_spec(config, path)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.split("_niter")[0] in CHANGED_BASE:
        raise CheckpointError(
            f"{path}: an adapter that started by {start} stands on changed base weights; save it "
            "in peft with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    spec = {"method": "lora", "r": config["r"], "alpha": config["lora_alpha"]}
    if config.get("use_dora"):
        if config.get("use_rslora") or config.get("lora_dropout"):
            raise CheckpointError(
                f"{path}: dora with use_rslora or lora_dropout is not available here"
            )
        return spec | {"method": "dora"}
    return spec | {
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": config.get("use_rslora", False),
    }


def miss_spec(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Bone, Bat-col or general DiSHA."""
    if config.get("miss_dropout"):
        raise CheckpointError(
            f"{path}: miss_dropout {config['miss_dropout']} is not available here"
        )
    form = config.get("init_weights", True)
    if form == "bat":
        return {"method": "bat", "r": config["r"], "mode": "col"}
    if form == "mini":
        return {"method": "disha", "r1": config["mini_r"], "r2": config["r"]}
    return {"method": "bone", "r": config["r"]}


def namings() -> dict[str, Naming]:
    """The names that layers have in other forms, by the words of --layer_names."""
    return {
        f"{form}_rwkv{generation.number}": layout.naming
        for generation in generations().values()
        for form, layout in generation.layouts.items()
        if layout.naming
    }


def renamed(adapter: PeftAdapter, rename: Callable[[str], str]) -> PeftAdapter:
    """An adapter with every layer's name changed."""
    return PeftAdapter({rename(key): t for key, t in adapter.tensors.items()}, adapter.spec)
