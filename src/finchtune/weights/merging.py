"""Adapter + base -> plain weights that every RWKV runtime loads, and back again.

No method's maths stands here: a weight is what its adapter's own `merged` or `unmerged` says.
Tensors are read, changed and written one at a time.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finchtune.adapters import Adapter, QuantisedWeight, get_method, hyperparameters_of
from finchtune.adapters.residual import ResidualLoRA
from finchtune.errors import CheckpointError, UserError
from finchtune.files import FileSet, json_text
from finchtune.models import INITIAL_STATE, sizes_of
from finchtune.weights.adapter_files import (
    adapter_record,
    check_base,
    read_adapter,
    record_hash,
    require_ours,
)
from finchtune.weights.base import fitting_model, read_base
from finchtune.weights.forms.safetensors import write_safetensors
from finchtune.weights.hashing import weights_sha256
from finchtune.weights.lazy import LazyTensors, layout_of
from finchtune.weights.pth import write_pth
from finchtune.weights.stated import spec_of
from finchtune.weights.tensors import check_finite, check_shapes

CHUNK = 2**18  # elements compared at a time

Changes = Mapping[str, dict[str, Tensor]]
"""Base name -> what changes it: {adapter tensor name: tensor}, or {"": the new weight}."""


class Merge(NamedTuple):
    """An adapter merged into a base, tensor by tensor as `weights` are asked for."""

    weights: LazyTensors
    spec: dict[str, Any]
    told: dict[str, Any]
    """What a receipt says of it."""
    largest: dict[str, float]
    """The largest change of each tensor that was asked for."""
    changed: Collection[str]

    def receipt(self) -> dict[str, Any]:
        """The receipt's part that does not depend on what is written."""
        return self.told | {"largest_change": {name: self.largest[name] for name in self.changed}}


def open_merge(
    base: str | Path,
    adapter: str | Path,
    *,
    methods: Collection[str] | None = None,
    stated: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    initial: str | Path | None = None,
    device: str = "cpu",
    other_base: bool = False,
) -> Merge:
    """An adapter merged into a base, in the base's dtypes and key order; as in `merge_files`."""
    record = adapter_record(adapter)
    if record and not other_base:
        check_base(record, base, adapter)
    tensors, weights = read_adapter(adapter, initial), read_base(base)
    fitting_model(weights, base)
    weights = with_initial_states(weights, tensors, base)
    changes = group_by_weight(tensors, weights, adapter)
    told = {**({} if record else defaults or {}), **(stated or {})}
    if initial:
        told.setdefault("method", "pissa")
    spec = spec_of(record, tensors, told, adapter)
    method = spec.get("method", "state" if all(map(is_state, tensors)) else "none")
    if methods and method not in methods:
        found = "a fully fine-tuned model" if method == "none" else method
        raise CheckpointError(
            f"{adapter} is {found}, not {' or '.join(methods)}; use merge/merge.py"
        )

    def merged(name: str, weight: Tensor, change: dict[str, Tensor]) -> Tensor:
        if "" in change:
            return replaced_weight(name, weight, change[""])
        moved, seen = filled_adapter(name, weight, change, spec).to(device), weight.to(device)
        if "quant" in spec:
            seen = quantised(seen, moved, spec["quant"], changed_base=record is None)
        return moved.merged(seen).to(weight.dtype).cpu()

    known = None if other_base else record_hash(record)
    replaced = sum("" in change for change in changes.values())
    receipt = {
        "method": method,
        "adapter_spec": spec,
        "base": {"file": Path(base).name, "sha256": known or weights_sha256(base)},
        "adapter": {"file": Path(adapter).name, "sha256": weights_sha256(adapter)},
        "merged": len(changes) - replaced,
        "replaced": replaced,
        "kept": len(weights) - len(changes),
    }
    if other_base:
        receipt["trained_on"] = (record or {}).get("base")
    changed, largest = changed_weights(weights, changes, merged, base)
    return Merge(changed, spec, receipt, largest, changes.keys())


def merge_files(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merge an adapter file into a base file and write `output` in the base's dtype and key order.

    The adapter's record says how. Files of other software have none: their method and sizes are
    read off the tensors, what these do not tell has to be `stated` where it has no `defaults`, and
    `initial` is PiSSA's second file.
    `methods` restricts what is accepted. Weights are computed on `device`. With `other_base` the
    base need not be the one that the adapter was trained on, which the receipt then tells as
    `trained_on`. `check(path, spec)` is called with the written file before it gets its name; what
    it raises undoes everything.

    Returns, and writes beside `output` as .merge.json, a receipt: the sha256 of base, adapter and
    output, the method, the largest change of each tensor, and counts of the tensors merged,
    replaced and kept.

    Raises UserError for a wrong base, one that would not load, tensors left over, or NaN or
    infinity; `output` is then not written.
    """
    merge = open_merge(base, adapter, **options)
    require_ours(receipt_path(output))
    with FileSet() as files:
        temporary = files.add(output)
        digest = write_weights(merge.weights, temporary, output)
        if check:
            check(temporary, merge.spec)
        output_told = {"file": Path(output).name, "sha256": digest}
        receipt = {"format": "finchtune merge 1", **merge.receipt(), "output": output_told}
        files.add(receipt_path(output)).write_text(json_text(receipt))
    return receipt


def quantised(weight: Tensor, adapter: Adapter, kind: str, changed_base: bool) -> Tensor:
    """The weight that an adapter stood on in training, in float32.

    `changed_base`: other software takes PiSSA's start off a weight before it quantises it.
    """
    if changed_base and isinstance(adapter, ResidualLoRA):
        start = adapter.scale * adapter.init_lora_B @ adapter.init_lora_A
        return QuantisedWeight(weight.float() - start, kind).dense(torch.float32) + start
    return QuantisedWeight(weight, kind).dense(torch.float32)


def changed_weights(
    weights: Mapping[str, Tensor],
    changes: Changes,
    change_weight: Callable[[str, Tensor, dict[str, Tensor]], Tensor],
    source: str | Path,
) -> tuple[LazyTensors, dict[str, float]]:
    """`weights`, read from `source`, with `changes` made, and each one's largest change.

    The second is filled as tensors are asked for. One that holds, or would hold, NaN or infinity
    raises UserError.
    """
    largest: dict[str, float] = {}

    @torch.no_grad()
    def tensor_of(name: str) -> Tensor:
        old, change = weights[name], changes.get(name)
        if change is None:
            check_finite({name: old}, source)
            return old
        new = change_weight(name, old, change)
        largest[name] = largest_gap(new, old)
        if not largest[name] < float("inf"):
            check_finite({name: old}, source)
            raise CheckpointError(f"{name} would hold NaN or infinity; nothing is written")
        return new

    return LazyTensors(layout_of(weights), tensor_of), largest


def write_weights(weights: LazyTensors, path: Path, name: str | Path) -> str:
    """Write to `path` in the form that the ending of `name` asks for; returns the sha256."""
    if Path(name).suffix == ".safetensors":
        return write_safetensors(weights, path)
    return write_pth(weights.layout, weights.values(), path)


def largest_gap(new: Tensor, old: Tensor) -> float:
    """The largest |new - old|, in float32; NaN or infinity if `new` holds them."""
    pairs = zip(new.flatten().split(CHUNK), old.flatten().split(CHUNK), strict=True)
    gaps = [(a.float() - b.float()).abs().max() for a, b in pairs if len(a)]
    return float(torch.stack(gaps).max()) if gaps else 0.0


def receipt_path(output: str | Path) -> Path:
    """Where the receipt of a merged file lies."""
    return Path(output).with_suffix(".merge.json")


def is_state(name: str) -> bool:
    """Whether a tensor is a block's initial state."""
    return name.endswith(INITIAL_STATE)


def with_initial_states(
    weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], base: str | Path
) -> Mapping[str, Tensor]:
    """A base's tensors and, where `tensors` hold initial states that it lacks, zeros as such.

    Raises UserError for states that no block of the base has, and for missing ones.
    """
    added = {name for name in tensors if is_state(name)} - set(weights)
    if not added:
        return weights
    layout = layout_of(weights)
    sizes = sizes_of(layout)
    shape = (sizes.n_head, sizes.head_size, sizes.head_size)
    expected = {f"blocks.{i}{INITIAL_STATE}": shape for i in range(sizes.n_layer)}
    check_shapes({name: tuple(tensors[name].shape) for name in added}, expected, f"state of {base}")
    zero = torch.zeros(shape, dtype=layout["emb.weight"].dtype)
    return LazyTensors(
        {**layout, **dict.fromkeys(expected, zero)},
        lambda name: zero if name in expected else weights[name],
    )


def group_by_weight(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], adapter: str | Path
) -> dict[str, dict[str, Tensor]]:
    """Sort an adapter's tensors by the base tensor that they change."""
    changes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, own = key.rpartition(".")
        name, part = (key, "") if key in weights else (f"{layer}.weight", own)
        if name not in weights:
            raise CheckpointError(
                f"{adapter}: {key} belongs to no tensor of the base; wrong base model?"
            )
        changes.setdefault(name, {})[part] = tensor
    return changes


def replaced_weight(name: str, weight: Tensor, trained: Tensor) -> Tensor:
    """A tensor that was trained itself, in the dtype of the one that it replaces."""
    if trained.shape != weight.shape:
        raise CheckpointError(
            f"{name} is {list(trained.shape)} in the adapter and {list(weight.shape)} in the base"
        )
    return trained.to(weight.dtype)


def filled_adapter(
    name: str, weight: Tensor, change: dict[str, Tensor], spec: dict[str, Any]
) -> Adapter:
    """The adapter of one base weight (out, in), with the tensors of its file, in float32."""
    method = get_method(spec["method"])
    known = hyperparameters_of(method)
    hyperparameters = {key: value for key, value in spec.items() if key in known}
    try:
        with torch.device("meta"):
            adapter = method(weight.shape[1], weight.shape[0], **hyperparameters)
    except UserError as error:
        raise CheckpointError(f"{name}: {error}") from error
    shapes = {part: list(tensor.shape) for part, tensor in adapter.state_dict().items()}
    found = {part: list(tensor.shape) for part, tensor in change.items()}
    if shapes != found:
        raise CheckpointError(f"{name}: the adapter holds {found}, {spec['method']} needs {shapes}")
    adapter.load_state_dict({part: t.float() for part, t in change.items()}, assign=True)
    return adapter
