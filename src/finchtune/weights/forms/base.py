"""What a form of weights is: how to know it, read it and write it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finchtune.data.templates import Template
from finchtune.errors import CheckpointError
from finchtune.models import INITIAL_STATE, Generation, generation_of, generations
from finchtune.models.layouts import Layout, Told
from finchtune.tokenizer import Tokenizer
from finchtune.weights.lazy import LazyTensors, layout_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYER = re.compile(r"0|[1-9][0-9]{0,3}")
FP16_LARGEST = torch.finfo(torch.float16).max


class Settings(NamedTuple):
    """What an export is asked for besides the weights."""

    dtype: str  # one of the form's own `dtypes`
    name: str  # of the model, for people
    tokenizer: Tokenizer | None = None
    template: Template | None = None
    layer_names: str = "plain"  # for peft: or one of the namings of peft_form


class FoundAdapter(NamedTuple):
    """An adapter as finchtune has it: file key -> tensor, and the method with its settings."""

    tensors: dict[str, Tensor]
    spec: dict[str, Any]


class LowRank(NamedTuple):
    """An adapter as LoRA: layer -> A (r, in) and B (out, r); each adds alpha / r B A."""

    layers: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float
    generation: Generation | None = None  # of the base, where one is known

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
    write_states: Callable[[Mapping[str, Tensor], Path, Settings], str] | None = None
    """Write initial states, `blocks.N.att.time_state` (H, N value, N key), by themselves."""


def layout_in(form: str, generation: Generation) -> Layout:
    """How a form lays a generation out. Raises UserError if it cannot hold it."""
    if form not in generation.layouts:
        others = ", ".join(generation.layouts)
        raise CheckpointError(f"the form {form} has no RWKV-{generation.number}; choose {others}")
    return generation.layouts[form]


def recognised(form: str, shapes: Mapping[str, Sequence[int]]) -> Generation | None:
    """The generation whose layout in a form has tensors of these names and shapes."""
    for generation in generations().values():
        if form in generation.layouts and generation.layouts[form].recognise(shapes):
            return generation
    return None


def called(form: str, name: str) -> Generation | None:
    """The generation that files of a form call by this name."""
    for generation in generations().values():
        if form in generation.layouts and generation.layouts[form].name == name:
            return generation
    return None


def to_form(weights: Mapping[str, Tensor], form: str) -> LazyTensors:
    """Official tensors in another form. Raises UserError for one that the form has no place for."""
    layout = layout_of(weights)
    generation = generation_of(layout)
    sizes = generation.sizes.from_weights(layout)
    names = generation.tensor_names(sizes.n_layer)
    own = layout_in(form, generation)
    own.check(sizes)
    by_name = {e.name: e for e in own.entries(Told(sizes.n_layer, names, sizes.head_size))}
    extra = {name for name in layout if not re.search(generation.unread, name)} - set(names)
    if extra:
        states = min(extra).endswith(INITIAL_STATE)
        raise CheckpointError(
            f"{min(extra)} is no tensor of a plain RWKV-{generation.number}: this form cannot "
            f"hold it{'; give the base, and the states with `adapter_only` 1' if states else ''}"
        )

    def make(name: str, source: Mapping[str, Tensor]) -> Tensor:
        return by_name[name].make([source[ours] for ours in by_name[name].ours])

    blank = {name: tensor.to("meta") for name, tensor in layout.items()}
    return LazyTensors({n: make(n, blank) for n in by_name}, lambda n: make(n, weights))


def from_form(
    theirs: Mapping[str, Tensor],
    form: str,
    generation: Generation,
    n_layer: int,
    path: Path,
    **more: Any,
) -> Mapping[str, Tensor]:
    """Tensors of another form by their official names, in the official order.

    `more` is what the file tells besides, by the names of `Told`.
    """
    if n_layer > len(theirs):
        raise CheckpointError(
            f"{path} has {len(theirs)} tensors, but layers up to number {n_layer - 1}"
        )
    names = generation.tensor_names(n_layer)
    entries = layout_in(form, generation).entries(Told(n_layer, names, **more))
    wanted = {entry.name for entry in entries}
    problems = [f"{name} is missing" for name in wanted - theirs.keys()]
    unknown = theirs.keys() - wanted
    problems += [f"{n} is not known" for n in unknown if not re.search(generation.unread, n)]
    if problems:
        raise CheckpointError(
            f"{path} is no whole RWKV-{generation.number}: {'; '.join(sorted(problems)[:5])}"
        )
    places = {ours: (e, i) for e in entries for i, ours in enumerate(e.ours)}

    def make(name: str, source: Mapping[str, Tensor]) -> Tensor:
        entry, index = places[name]
        return entry.split(source[entry.name])[index].contiguous()

    blank = {name: tensor.to("meta") for name, tensor in layout_of(theirs).items()}
    try:
        layout = {n: make(n, blank) for n in names}
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
    """How many layers the tensors' names have; `pattern` stands before a layer's number.

    Numbers that no model reaches do not count: their tensors are then of none of the layers.
    """
    numbers = (name.removeprefix(pattern).partition(".")[0] for name in names
               if name.startswith(pattern))  # fmt: skip
    return 1 + max((int(number) for number in numbers if LAYER.fullmatch(number)), default=-1)
