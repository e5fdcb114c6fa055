"""GGUF, architecture rwkv6: llama.cpp, Ollama and what is built on them.

Names and layouts as llama.cpp's own converter makes them (convert_hf_to_gguf.py, Rwkv6Model), and
as its loader wants them (src/models/rwkv6.cpp). Written and read through the `gguf` package.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.tokenizer import BytesTokenizer, Tokenizer, WorldTokenizer
from finchtune.weights.forms.base import (
    DTYPES,
    Form,
    FoundAdapter,
    LowRank,
    Settings,
    converted,
    from_form,
    n_layer_of,
    to_form,
)
from finchtune.weights.forms.gguf_entries import RESCALE, entries
from finchtune.weights.forms.templates import jinja_of, ollama_of
from finchtune.weights.hashing import HashingWriter
from finchtune.weights.lazy import layout_of
from finchtune.weights.pth import bytes_of

MAGIC = b"GGUF"
ARCHITECTURE = "rwkv6"
CONTEXT = 1 << 20  # not limited by the model
END_OF_TURN = b"\n\n"
CHUNK = 1 << 22  # numbers quantised at a time
KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"} | {
    kind.lower(): kind for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
}
ALWAYS_FLOAT32 = re.compile(r"norm|lerp|time_mix_(ln|first|w1|w2|decay)")


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


def read(path: Path) -> Mapping[str, Tensor]:
    """A model's tensors. Those of later layers are made when asked for: see RESCALE."""
    reader = open_gguf(path)
    architecture = field(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"{path} holds a {architecture} model, not an RWKV-6")
    theirs = tensors_of(reader, path)
    rescale = field(reader, f"{ARCHITECTURE}.rescale_every_n_layers")
    return from_form(theirs, entries(n_layer_of(theirs, "blk."), int(rescale or 0)), path)


def write(weights: Mapping[str, Tensor], path: Path, settings: Settings) -> str:
    """Write a model with its vocabulary and template; returns the file's sha256."""
    import gguf

    layout = layout_of(weights)
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(settings.name)
    add_sizes(writer, layout)
    kind = getattr(gguf.GGMLQuantizationType, KINDS[settings.dtype])
    writer.add_file_type(file_type(settings.dtype))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, settings, layout["emb.weight"].shape[0])
    theirs = to_form(weights, entries(n_layer_of(layout, "blocks.")))
    return write_tensors(writer, theirs, kind, path)


def file_type(dtype: str) -> int:
    """What the metadata calls a file whose matrices mostly have this type."""
    import gguf

    if dtype == "fp32":
        return gguf.LlamaFileType.ALL_F32
    return getattr(gguf.LlamaFileType, f"MOSTLY_{KINDS[dtype]}")


def add_sizes(writer: Any, layout: Mapping[str, Tensor]) -> None:
    """The sizes that the runtime reads, off the tensors' shapes."""
    n_embd = layout["emb.weight"].shape[1]
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer_of(layout, "blocks."))
    writer.add_layer_norm_eps(1e-5)
    writer.add_rescale_every_n_layers(RESCALE)
    writer.add_wkv_head_size(layout["blocks.0.att.time_faaaa"].shape[1])
    writer.add_time_mix_extra_dim(layout["blocks.0.att.time_maa_w2"].shape[1])
    writer.add_time_decay_extra_dim(layout["blocks.0.att.time_decay_w1"].shape[1])
    writer.add_feed_forward_length(layout["blocks.0.ffn.key.weight"].shape[0])
    writer.add_head_count(0)  # asked for, not used


def add_vocabulary(writer: Any, settings: Settings, vocab_size: int) -> None:
    """The tokens, each as the escaped bytes of Python's repr, and the chat template."""
    import gguf

    tokens = [token_bytes(settings.tokenizer, id) for id in range(vocab_size)]
    kinds = [gguf.TokenType.NORMAL if token else gguf.TokenType.UNUSED for token in tokens]
    texts = [repr(token)[2:-1] if token else f"[PAD{id}]" for id, token in enumerate(tokens)]
    texts[0], kinds[0] = "<s>", gguf.TokenType.CONTROL
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if END_OF_TURN in tokens:
        writer.add_eot_token_id(tokens.index(END_OF_TURN))
    if settings.template:
        writer.add_chat_template(jinja_of(settings.template))


def token_bytes(tokenizer: Tokenizer | None, id: int) -> bytes:
    """The bytes of a token, none for one that stands for no text."""
    if not isinstance(tokenizer, WorldTokenizer | BytesTokenizer):
        raise CheckpointError(
            "a GGUF of RWKV-6 holds the World vocabulary or bytes, no other tokenizer"
        )
    return tokenizer.id_bytes(id) if 0 < id < tokenizer.vocab_size else b""


def write_tensors(writer: Any, tensors: Mapping[str, Tensor], kind: Any, path: Path) -> str:
    """Write the metadata and the tensors one after another; returns the file's sha256."""
    import gguf

    float32 = gguf.GGMLQuantizationType.F32
    kinds = {name: stored_as(name, like, kind, float32)
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


def stored_as(name: str, tensor: Tensor, kind: Any, float32: Any) -> Any:
    """The type of one tensor in a file whose matrices have `kind`."""
    return float32 if tensor.dim() == 1 or ALWAYS_FLOAT32.search(name) else kind


def encoded(name: str, tensor: Tensor, kind: Any) -> list[memoryview] | Any:
    """A tensor's bytes in pieces. Raises UserError where fp16 overflows."""
    import gguf

    for ours, theirs in KINDS.items():
        if theirs == kind.name and ours in DTYPES:
            yield bytes_of(converted(name, tensor, DTYPES[ours]))
            return
    rows = tensor.reshape(-1, tensor.shape[-1])
    for part in rows.split(max(1, CHUNK // rows.shape[1])):
        quantised = gguf.quants.quantize(part.float().numpy(), kind)
        yield np.ascontiguousarray(quantised).reshape(-1).view(np.uint8).data


def write_adapter(adapter: LowRank, path: Path, settings: Settings) -> str:
    """Write an adapter for a base that was written with the same RESCALE."""
    import gguf

    n_layer = n_layer_of(list(adapter.layers), "blocks.")
    entry_of = {entry.ours[0]: entry for entry in entries(n_layer)}
    tensors: dict[str, Tensor] = {}
    for layer, (A, B) in adapter.layers.items():
        entry = entry_of[f"{layer}.weight"]
        tensors[f"{entry.name}.lora_a"] = A
        tensors[f"{entry.name}.lora_b"] = entry.make([B])
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(settings.name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
    kind = getattr(gguf.GGMLQuantizationType, KINDS[settings.dtype])
    return write_tensors(writer, tensors, kind, path)


def read_adapter(path: Path) -> FoundAdapter:
    """A LoRA for llama.cpp, of a base with the usual RESCALE."""
    import gguf

    reader = open_gguf(path)
    if field(reader, gguf.Keys.Adapter.TYPE) != "lora":
        raise CheckpointError(f"{path} is no LoRA")
    found = tensors_of(reader, path)
    n_layer = n_layer_of(found, "blk.")
    entry_of = {entry.name: entry for entry in entries(n_layer)}
    layers = {}
    for name, A in found.items():
        base, _, side = name.rpartition(".")
        if side == "lora_b" and f"{base}.lora_a" in found:
            continue
        if side != "lora_a" or base not in entry_of or f"{base}.lora_b" not in found:
            raise CheckpointError(f"{path}: {name} belongs to no linear layer of an RWKV-6")
        B = entry_of[base].split(found[f"{base}.lora_b"])[0]
        layers[entry_of[base].ours[0].removesuffix(".weight")] = (A, B)
    return LowRank(layers, float(field(reader, gguf.Keys.Adapter.LORA_ALPHA))).found()


def modelfile(output: Path, settings: Settings, is_adapter: bool) -> tuple[str, str]:
    """Ollama's Modelfile: where the weights lie, the template, and where answers stop."""
    lines = ["FROM ./BASE.gguf", f"ADAPTER ./{output.name}"] if is_adapter else []
    lines = lines or [f"FROM ./{output.name}"]
    if settings.template:
        lines.append(f'TEMPLATE """{ollama_of(settings.template)}"""')
        lines += [f'PARAMETER stop """{text}"""' for text in settings.template.stop]
    return f"{output.name}.Modelfile", "\n".join(lines) + "\n"


FORM = Form(
    name="gguf",
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
