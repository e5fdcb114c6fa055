"""What a form of weights is: how to know it, read it and write it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finchtune.data.templates import Template
from finchtune.errors import CheckpointError
from finchtune.tokenizer import Tokenizer
from finchtune.weights.lazy import LazyTensors, layout_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FP16_LARGEST = torch.finfo(torch.float16).max


class Settings(NamedTuple):
    """What an export is asked for besides the weights."""

    dtype: str  # one of the form's own `dtypes`
    name: str  # of the model, for people
    tokenizer: Tokenizer | None = None
    template: Template | None = None
    hf_names: bool = False  # layers named as in Hugging Face's layout, for peft


class FoundAdapter(NamedTuple):
    """An adapter as finchtune has it: file key -> tensor, and the method with its settings."""

    tensors: dict[str, Tensor]
    spec: dict[str, Any]


class LowRank(NamedTuple):
    """An adapter as LoRA: layer -> A (r, in) and B (out, r); each adds alpha / r B A."""

    layers: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float

    def found(self) -> FoundAdapter:
        """The same as the method lora has it."""
        tensors: dict[str, Tensor] = {}
        for layer, (A, B) in self.layers.items():
            tensors |= {f"{layer}.lora_A": A, f"{layer}.lora_B": B}
        r = len(next(iter(self.layers.values()))[0])
        return FoundAdapter(tensors, {"method": "lora", "r": r, "alpha": self.alpha})


@dataclass(frozen=True)
class Form:
    """A form of weights, named as `--to` takes it.

    `recognise(path)` only looks. `read(path)` gives a model's tensors by their official names,
    mapped or lazy; `write(weights, path, settings)` writes a file and returns its sha256, or into
    an empty folder, with at most one tensor in memory at a time. The same for low-rank adapters.
    Without one of them the form cannot do that. All raise UserError, naming the file, for what does
    not fit or is damaged. The first of `dtypes` stands in for one that the form does not have.
    """

    name: str
    title: str
    recognise: Callable[[Path], bool]
    dtypes: tuple[str, ...]
    suffix: str = ""  # of its files; a form without one is a folder
    read: Callable[[Path], Mapping[str, Tensor]] | None = None
    write: Callable[[Mapping[str, Tensor], Path, Settings], str | None] | None = None
    beside: Callable[[Path, Settings, bool], tuple[str, str]] | None = None
    """(output, settings, whether it is an adapter) -> name and text of a file to lie beside it."""
    recognise_adapter: Callable[[Path], bool] = lambda path: False
    read_adapter: Callable[[Path], FoundAdapter] | None = None
    write_adapter: Callable[[LowRank, Path, Settings], str | None] | None = None


@dataclass(frozen=True)
class Entry:
    """A tensor of another form, and the official ones that it is made of.

    `make` takes theirs from ours, `split` is its inverse. Both take meta tensors and give views
    where they can.
    """

    name: str
    ours: tuple[str, ...]
    make: Callable[[Sequence[Tensor]], Tensor] = lambda ours: ours[0]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda theirs: [theirs]


def reshaped(name: str, ours: str, make: Callable[..., Any], split: Callable[..., Any]) -> Entry:
    """An entry for one tensor that is laid out otherwise."""
    return Entry(name, (ours,), lambda tensors: make(tensors[0]), lambda theirs: [split(theirs)])


def to_form(weights: Mapping[str, Tensor], entries: Sequence[Entry]) -> LazyTensors:
    """Official tensors in another form. Raises UserError for one that the form has no place for."""
    by_name = {entry.name: entry for entry in entries}
    layout = layout_of(weights)
    extra = set(layout) - {name for entry in entries for name in entry.ours}
    if extra:
        raise CheckpointError(
            f"{min(extra)} is no tensor of a plain RWKV-6: this form cannot hold it"
        )

    def make(name: str, source: Mapping[str, Tensor]) -> Tensor:
        return by_name[name].make([source[ours] for ours in by_name[name].ours])

    blank = {name: tensor.to("meta") for name, tensor in layout.items()}
    return LazyTensors({n: make(n, blank) for n in by_name}, lambda n: make(n, weights))


def from_form(
    theirs: Mapping[str, Tensor], entries: Sequence[Entry], path: Path
) -> Mapping[str, Tensor]:
    """Tensors of another form by their official names, in the official order."""
    wanted = {entry.name for entry in entries}
    problems = [f"{name} is missing" for name in wanted - theirs.keys()]
    problems += [f"{name} is not known" for name in theirs.keys() - wanted]
    if problems:
        raise CheckpointError(f"{path} is no whole RWKV-6: {'; '.join(sorted(problems)[:5])}")
    places = {ours: (e, i) for e in entries for i, ours in enumerate(e.ours)}

    def make(name: str, source: Mapping[str, Tensor]) -> Tensor:
        entry, index = places[name]
        return entry.split(source[entry.name])[index].contiguous()

    blank = {name: tensor.to("meta") for name, tensor in layout_of(theirs).items()}
    try:
        layout = {n: make(n, blank) for n in official_names(n_layer_of(places, "blocks."))}
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"{path}: a tensor has an unexpected shape: {error}") from error
    return LazyTensors(layout, lambda name: make(name, theirs))


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype. Raises UserError where fp16 would make infinity of a number."""
    if tensor.dtype == dtype:
        return tensor
    if dtype == torch.float16 and not tensor.is_meta and tensor.numel():
        lowest, highest = torch.aminmax(tensor)
        largest = max(-float(lowest), float(highest))
        if largest > FP16_LARGEST:
            raise CheckpointError(
                f"{name} reaches {largest:.6g}, above fp16's largest number of 65504; "
                "choose `dtype` bf16 or fp32, in a form that has it"
            )
    return tensor.to(dtype)


def n_layer_of(names: Iterable[str], pattern: str) -> int:
    """How many layers the tensors' names have; `pattern` stands before a layer's number."""
    numbers = (name.removeprefix(pattern).partition(".")[0] for name in names
               if name.startswith(pattern))  # fmt: skip
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def official_names(n_layer: int) -> Iterator[str]:
    """Every tensor of a plain RWKV-6, in the order of its file."""
    yield "emb.weight"
    for layer in range(n_layer):
        for norm in ("ln1", "ln2", *(["ln0"] if layer == 0 else [])):
            yield from (f"blocks.{layer}.{norm}.{part}" for part in ("weight", "bias"))
        yield from (f"blocks.{layer}.att.{part}" for part in ATT)
        yield from (f"blocks.{layer}.ffn.{part}" for part in FFN)
    yield from ("ln_out.weight", "ln_out.bias", "head.weight")


ATT = (
    *("time_maa_x", "time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g"),
    *("time_maa_w1", "time_maa_w2", "time_decay", "time_decay_w1", "time_decay_w2", "time_faaaa"),
    *("receptance.weight", "key.weight", "value.weight", "output.weight", "gate.weight"),
    *("ln_x.weight", "ln_x.bias"),
)
FFN = ("time_maa_k", "time_maa_r", "key.weight", "receptance.weight", "value.weight")
