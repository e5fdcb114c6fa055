"""Folders of weights as Hugging Face's transformers keeps them, whole or in shards."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.files import read_json, write_json
from finchtune.tokenizer import Tokenizer, WorldTokenizer
from finchtune.weights.forms.base import DTYPES, Settings, converted
from finchtune.weights.forms.safetensors import read_safetensors, write_safetensors
from finchtune.weights.forms.templates import jinja_of
from finchtune.weights.lazy import mapped
from finchtune.weights.tensors import read_tensors

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
VOCABULARY = "rwkv_vocab_v20230424.txt"
SHARD_NAME = re.compile(r"[\w.-]+\.(safetensors|bin)")
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def config_of(path: Path) -> dict[str, Any]:
    """A folder's config.json, {} if there is none. Raises UserError if it is broken."""
    if not (path / CONFIG).is_file():
        return {}
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG}: not a JSON object")
    return config


def weight_files(path: Path) -> list[Path]:
    """The files that hold a folder's weights, [] if it has none."""
    for name in WEIGHTS:
        index = path / f"{name}.index.json"
        if index.is_file():
            return shards_of(index)
        if (path / name).is_file():
            return [path / name]
    return []


def is_rwkv6_folder(path: Path, architecture: str, key: str) -> bool:
    """Whether config.json names this architecture, or is of an RWKV-6 and has this key."""
    if not path.is_dir() or not weight_files(path):
        return False
    config = config_of(path)
    return architecture in (config.get("architectures") or []) or (
        config.get("model_type") == "rwkv6" and key in config
    )


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, all beside it and all there."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if not SHARD_NAME.fullmatch(name):
            raise CheckpointError(f"{index} names {name!r}, which is no file of weights beside it")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: no such file; {index.name} names it")
    return [index.parent / name for name in names]


def read_folder(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder, memory-mapped."""
    found: dict[str, Tensor] = {}
    for file in weight_files(path):
        part = read_safetensors(file) if file.suffix == ".safetensors" else read_tensors(file)
        found |= part
    return found


def write_folder(
    tensors: Mapping[str, Tensor], path: Path, config: dict[str, Any], settings: Settings
) -> None:
    """Write weights, configuration and tokenizer into an empty folder."""
    dtype = DTYPES[settings.dtype]
    write_safetensors(mapped(tensors, lambda n, t: converted(n, t, dtype)), path / WEIGHTS[0])
    common = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": DTYPE_NAMES[settings.dtype],
        "use_cache": True,
    }
    write_json(path / CONFIG, config | common)
    if settings.tokenizer:
        write_tokenizer(settings.tokenizer, path)
    if settings.template:
        (path / "chat_template.jinja").write_text(jinja_of(settings.template))


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Copy a tokenizer's vocabulary, under the name that readers look for."""
    if isinstance(tokenizer, WorldTokenizer):
        shutil.copyfile(tokenizer.vocab_file, path / VOCABULARY)
    elif tokenizer.name.endswith(".json"):
        shutil.copyfile(tokenizer.name, path / "tokenizer.json")
