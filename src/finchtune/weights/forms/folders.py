"""Folders of weights as Hugging Face's transformers keeps them, whole or in shards."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.files import read_object, write_json
from finchtune.models import Generation, generation_of, generations
from finchtune.tokenizer import Tokenizer, WorldTokenizer
from finchtune.weights import remote_code
from finchtune.weights.forms.base import (
    DTYPES,
    Settings,
    called,
    converted,
    layout_in,
    to_form,
)
from finchtune.weights.forms.safetensors import read_safetensors, write_safetensors
from finchtune.weights.forms.templates import jinja_of
from finchtune.weights.lazy import layout_of, mapped
from finchtune.weights.tensors import read_tensors

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_CONFIG = "tokenizer_config.json"
REMOTE_CODE = Path(remote_code.__file__).parent
WORLD_MODULE, WORLD_CLASS = "tokenization_rwkv_world", "RwkvWorldTokenizer"
VOCABULARY = "rwkv_vocab_v20230424.txt"
SHARD_NAME = re.compile(r"[\w.-]+\.(safetensors|bin)")
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def config_of(path: Path) -> dict[str, Any]:
    """A folder's config.json, {} if there is none. Raises UserError if it is broken."""
    return read_object(path / CONFIG) if (path / CONFIG).is_file() else {}


def weight_files(path: Path) -> list[Path]:
    """The files that hold a folder's weights, [] if it has none."""
    for name in WEIGHTS:
        index = path / f"{name}.index.json"
        if index.is_file():
            return shards_of(index)
        if (path / name).is_file():
            return [path / name]
    return []


def generation_of_folder(path: Path, form: str) -> Generation | None:
    """The generation that config.json names as a form does, None for a folder of another form."""
    if not path.is_dir() or not weight_files(path):
        return None
    config = config_of(path)
    named = config.get("architectures")
    for architecture in named if isinstance(named, list) else []:
        if generation := called(form, str(architecture)):
            return generation
    for generation in generations().values():
        layout = generation.layouts.get(form)
        if layout and config.get("model_type") == model_type(generation) and layout.mark in config:
            return generation
    return None


def model_type(generation: Generation) -> str:
    """What config.json calls a generation."""
    return f"rwkv{generation.number}"


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, all beside it and all there."""
    places = read_object(index).get("weight_map")
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


def write_folder(weights: Mapping[str, Tensor], form: str, path: Path, settings: Settings) -> None:
    """Write weights, configuration and tokenizer into an empty folder."""
    generation = generation_of(layout_of(weights))
    layout = layout_in(form, generation)
    sizes = generation.sizes.from_weights(layout_of(weights))
    tensors, dtype = to_form(weights, form), DTYPES[settings.dtype]
    write_safetensors(mapped(tensors, lambda n, t: converted(n, t, dtype)), path / WEIGHTS[0])
    config = {
        "architectures": [layout.name],
        "model_type": model_type(generation),
        **layout.told(sizes),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": DTYPE_NAMES[settings.dtype],
        "use_cache": True,
    }
    write_json(path / CONFIG, config)
    if settings.tokenizer:
        write_tokenizer(settings.tokenizer, path)
    if settings.template:
        (path / "chat_template.jinja").write_text(jinja_of(settings.template))


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write what AutoTokenizer loads: a vocabulary, and for World the code that reads it.

    That of bytes has no such form.
    """
    if isinstance(tokenizer, WorldTokenizer):
        shutil.copyfile(tokenizer.vocab_file, path / VOCABULARY)
        shutil.copyfile(REMOTE_CODE / f"{WORLD_MODULE}.py", path / f"{WORLD_MODULE}.py")
        code = {"auto_map": {"AutoTokenizer": [f"{WORLD_MODULE}.{WORLD_CLASS}", None]}}
        write_json(path / TOKENIZER_CONFIG, {"tokenizer_class": WORLD_CLASS, **code})
    elif tokenizer.name.endswith(".json"):
        shutil.copyfile(tokenizer.name, path / "tokenizer.json")
        write_json(path / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"})
