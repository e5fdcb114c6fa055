"""GGUF: llama.cpp, Ollama and what is built on them. Written and read through package `gguf`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.models import Generation, ModelSizes, generation_of, generations
from finchtune.models.layouts import Entry, Told
from finchtune.weights.forms.base import (
    DTYPES,
    Form,
    FoundAdapter,
    LowRank,
    Settings,
    called,
    converted,
    from_form,
    layout_in,
    n_layer_of,
    to_form,
)
from finchtune.weights.forms.gguf_vocabulary import add_vocabulary
from finchtune.weights.forms.templates import ollama_of
from finchtune.weights.hashing import HashingWriter
from finchtune.weights.lazy import layout_of
from finchtune.weights.pth import bytes_of

MAGIC = b"GGUF"
NAME = "gguf"
CONTEXT = 1 << 20  # not limited by the model
CHUNK = 1 << 20  # numbers converted at a time: they stay in a cache
KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"} | {
    kind.lower(): kind for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
}


def recognise_any(path: Path) -> bool:
    """By the magic number."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_gguf(path: Path) -> Any:
    """A GGUFReader of a file; raises UserError if it is damaged."""
    import gguf

    size = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path, "c")
    except (ValueError, IndexError, KeyError, OverflowError, OSError, UnicodeError) as error:
        raise CheckpointError(
            f"{path} ({size:,} bytes): damaged or cut short ({error}); copy it again"
        ) from error
    return reader


def field(reader: Any, key: str) -> Any:
    """The value of a metadata field, None if there is none."""
    found = reader.get_field(key)
    return found.contents() if found else None


def is_adapter(path: Path) -> bool:
    """A GGUF that says that it is an adapter."""
    return recognise_any(path) and field(open_gguf(path), "general.type") == "adapter"


def recognise(path: Path) -> bool:
    """A GGUF that is no adapter."""
    return recognise_any(path) and not is_adapter(path)


def tensors_of(reader: Any, path: Path) -> dict[str, Tensor]:
    """A file's tensors, memory-mapped. Raises UserError for quantised ones."""
    import gguf

    kinds = {getattr(gguf.GGMLQuantizationType, KINDS[name]): dtype
             for name, dtype in DTYPES.items()}  # fmt: skip
    found = {}
    for tensor in reader.tensors:
        if tensor.tensor_type not in kinds:
            raise CheckpointError(
                f"{path} holds {tensor.name} as {tensor.tensor_type.name}: what quantising took "
                "away is lost; give the F32, F16 or BF16 file that it was made from"
            )
        shape = [int(size) for size in reversed(tensor.shape)]
        raw = torch.from_numpy(tensor.data.reshape(-1).view(np.uint8))
        found[tensor.name] = raw.view(kinds[tensor.tensor_type]).view(shape)
    return found


def generation_in(reader: Any, path: Path) -> Generation:
    """The generation that a file says that it holds. Raises UserError for other models."""
    architecture = field(reader, "general.architecture")
    generation = called(NAME, architecture)
    if generation is None:
        known = ", ".join(f"RWKV-{one.number}" for one in generations().values())
        raise CheckpointError(f"{path} holds a {architecture} model, none of {known}")
    return generation


def read(path: Path) -> Mapping[str, Tensor]:
    """A model's tensors. Those of later layers are made when asked for: see RESCALE."""
    reader = open_gguf(path)
    generation = generation_in(reader, path)
    theirs = tensors_of(reader, path)
    prefix = layout_in(NAME, generation).name
    rescale = field(reader, f"{prefix}.rescale_every_n_layers")
    head_size = field(reader, f"{prefix}.wkv.head_size")
    told = {"rescale": int(rescale or 0), "head_size": int(head_size or 1)}
    return from_form(theirs, NAME, generation, n_layer_of(theirs, "blk."), path, **told)


def write(weights: Mapping[str, Tensor], path: Path, settings: Settings) -> str:
    """Write a model with its vocabulary and template; returns the file's sha256."""
    import gguf

    layout = layout_of(weights)
    generation = generation_of(layout)
    own = layout_in(NAME, generation)
    writer = gguf.GGUFWriter(None, own.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(settings.name)
    sizes = generation.sizes.from_weights(layout)
    add_sizes(writer, sizes, own.told(sizes))
    kind = getattr(gguf.GGMLQuantizationType, KINDS[settings.dtype])
    writer.add_file_type(file_type(settings.dtype))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, settings, sizes.vocab_size)
    return write_tensors(writer, to_form(weights, NAME), kind, path, own.precise)


def file_type(dtype: str) -> int:
    """What the metadata calls a file whose matrices mostly have this type."""
    import gguf

    if dtype == "fp32":
        return gguf.LlamaFileType.ALL_F32
    return getattr(gguf.LlamaFileType, f"MOSTLY_{KINDS[dtype]}")


def add_sizes(writer: Any, sizes: ModelSizes, more: Mapping[str, Any]) -> None:
    """The sizes that the runtime reads, those of every generation and more."""
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(sizes.n_embd)
    writer.add_block_count(sizes.n_layer)
    writer.add_layer_norm_eps(1e-5)
    writer.add_feed_forward_length(sizes.dim_ffn)
    writer.add_head_count(0)  # asked for, not used
    for key, value in more.items():
        writer.add_uint32(f"{writer.arch}.{key}", value)


def write_tensors(
    writer: Any, tensors: Mapping[str, Tensor], kind: Any, path: Path, precise: str
) -> str:
    """Write the metadata and the tensors one after another; returns the file's sha256.

    Vectors, and tensors whose names match `precise`, are written in fp32.
    """
    import gguf

    float32 = gguf.GGMLQuantizationType.F32
    kinds = {name: float32 if like.dim() == 1 or re.search(precise, name) else kind
             for name, like in layout_of(tensors).items()}  # fmt: skip
    for name, like in layout_of(tensors).items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        if like.shape[-1] % block:
            raise CheckpointError(
                f"{name} has rows of {like.shape[-1]}, which blocks of {block} do not divide; "
                "choose `dtype` fp16"
            )
        writer.add_tensor_info(
            name, like.shape, np.float32, like.numel() // block * size, raw_dtype=kinds[name]
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with HashingWriter(path.open("r+b")) as file:
        file.keep()
        for name, tensor in tensors.items():
            file.write(bytes(-file.file.tell() % writer.data_alignment))
            for content in encoded(name, tensor, kinds[name]):
                file.write(content)
        file.write(bytes(-file.file.tell() % writer.data_alignment))
        return file.sha256()


def encoded(name: str, tensor: Tensor, kind: Any) -> list[memoryview] | Any:
    """A tensor's bytes in pieces. Raises UserError where fp16 overflows."""
    import gguf

    plain = {theirs: DTYPES[ours] for ours, theirs in KINDS.items() if ours in DTYPES}
    rows = tensor.reshape(-1, tensor.shape[-1])
    for part in rows.split(max(1, CHUNK // rows.shape[1])):
        if kind.name in plain:
            yield bytes_of(converted(name, part, plain[kind.name]))
        else:
            quantised = gguf.quants.quantize(part.float().numpy(), kind)
            yield np.ascontiguousarray(quantised).reshape(-1).view(np.uint8).data


def entries_of(generation: Generation, n_layer: int) -> list[Entry]:
    """Every tensor of this form, of a base with the usual RESCALE."""
    names = generation.tensor_names(n_layer)
    return layout_in(NAME, generation).entries(Told(n_layer, names))


def write_adapter(adapter: LowRank, path: Path, settings: Settings) -> str:
    """Write an adapter for a base that was written with the same RESCALE."""
    import gguf

    assert adapter.generation is not None
    own = layout_in(NAME, adapter.generation)
    entries = entries_of(adapter.generation, n_layer_of(list(adapter.layers), "blocks."))
    entry_of = {name: entry for entry in entries for name in entry.ours}
    tensors: dict[str, Tensor] = {}
    for layer, (A, B) in adapter.layers.items():
        entry = entry_of[f"{layer}.weight"]
        tensors[f"{entry.name}.lora_a"] = A
        tensors[f"{entry.name}.lora_b"] = entry.make([B])
    writer = gguf.GGUFWriter(None, own.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(settings.name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
    kind = getattr(gguf.GGMLQuantizationType, KINDS[settings.dtype])
    return write_tensors(writer, tensors, kind, path, own.precise)


def read_adapter(path: Path) -> FoundAdapter:
    """A LoRA for llama.cpp, of a base with the usual RESCALE."""
    import gguf

    reader = open_gguf(path)
    if field(reader, gguf.Keys.Adapter.TYPE) != "lora":
        raise CheckpointError(f"{path} is no LoRA")
    found = tensors_of(reader, path)
    generation = generation_in(reader, path)
    entries = entries_of(generation, n_layer_of(found, "blk."))
    entry_of = {entry.name: entry for entry in entries}
    layers = {}
    for name, A in found.items():
        base, _, side = name.rpartition(".")
        if side == "lora_b" and f"{base}.lora_a" in found:
            continue
        if side != "lora_a" or base not in entry_of or f"{base}.lora_b" not in found:
            raise CheckpointError(f"{path}: {name} belongs to no linear layer of an RWKV")
        B = entry_of[base].split(found[f"{base}.lora_b"])[0]
        layers[entry_of[base].ours[0].removesuffix(".weight")] = (A, B)
    alpha = field(reader, gguf.Keys.Adapter.LORA_ALPHA)
    if not layers or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise CheckpointError(f"{path} is no whole LoRA: {len(layers)} layers, alpha {alpha}")
    return LowRank(layers, float(alpha)).found()


def modelfile(output: Path, settings: Settings, is_adapter: bool) -> tuple[str, str]:
    """Ollama's Modelfile: where the weights lie, the template, and where answers stop."""
    lines = ["FROM ./BASE.gguf", f"ADAPTER ./{output.name}"] if is_adapter else []
    lines = lines or [f"FROM ./{output.name}"]
    if settings.template:
        lines.append(f'TEMPLATE """{ollama_of(settings.template)}"""')
        lines += [f'PARAMETER stop """{text}"""' for text in settings.template.stop]
    return f"{output.name}.Modelfile", "\n".join(lines) + "\n"


FORM = Form(
    name=NAME,
    title="a GGUF (llama.cpp, Ollama)",
    suffix=".gguf",
    dtypes=("fp16", *(name for name in KINDS if name != "fp16")),
    recognise=recognise,
    read=read,
    write=write,
    beside=modelfile,
    recognise_adapter=is_adapter,
    read_adapter=read_adapter,
    write_adapter=write_adapter,
)
